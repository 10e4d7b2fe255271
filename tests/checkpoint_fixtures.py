"""Models with every kind of layer, saved and loaded with and without this package."""

import warnings

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig, DoraLayer
from dora_peft.plugin.configs import plain_peft_configs

IDS = torch.arange(12).view(2, 6)
# PEFT says this where an embedding is targeted; whether the table is saved as well is its own decision
EMBEDDING_SAVED = "Setting `save_embedding_layers` to `True`"


class Net(nn.Module):
    """One layer of every kind that PEFT's use_dora adapts, in a chain."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 8)
        self.no_bias = nn.Linear(8, 8, bias=False)
        self.transposed = Conv1D(8, 8)
        nn.init.normal_(self.transposed.weight)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3d = nn.Conv3d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.transposed(self.no_bias(self.linear(self.embed(ids))))
        # [N, 8, length, 1]
        x = self.conv1d(x.transpose(1, 2))[..., None]
        x = self.grouped(self.conv2d(x))[..., None]
        return self.head(self.conv3d(x).flatten(2).transpose(1, 2))


def net():
    torch.manual_seed(0)
    return Net().double().eval()


@torch.no_grad()
def train(model, adapter="default", seed=1):
    """Move every tensor of one adapter as training would: factors freely, magnitudes by some percent."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}" not in name or not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.add_(0.2 * noise)
    return model.eval()


@torch.no_grad()
def output(model, ids=IDS):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def same(found, expected):
    # m is kept in float64 over a float64 base and written as such
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def differs(found, other):
    assert (found - other).abs().max() > 1e-3


def save(model, folder, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=EMBEDDING_SAVED)
        model.save_pretrained(folder, **options)
    return folder


def load_plain(base, folder):
    with plain_peft_configs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=EMBEDDING_SAVED)
        model = PeftModel.from_pretrained(base, folder)
    assert type(model.peft_config["default"]) is LoraConfig
    assert not any(isinstance(m, DoraLayer) for m in model.modules())
    return model.eval()


def load_ours(base, folder, **options):
    model = PeftModel.from_pretrained(base, folder, **options)
    assert type(model.peft_config["default"]) is DoraConfig
    return model.eval()


def zero_net(kind):
    """A net in which some outputs of `kind` have a zero weight row."""
    model = net()
    weight = model.get_submodule(kind).weight
    with torch.no_grad():
        weight[:, [1, 4]] = 0 if kind in ("embed", "transposed") else weight[:, [1, 4]]
        if kind not in ("embed", "transposed"):
            weight[[1, 4]] = 0
    return model


def llama(**changes):
    """A tiny Llama in float64, so that equal means equal to 1e-9, with weights large enough for the adapter to show."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes), initializer_range=0.2)).double().eval()


OPTIONS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all-linear, patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"v_proj": 2, "layers.0.mlp.up_proj": 6},
        "alpha_pattern": {"down_proj": 5},
        "use_rslora": True,
    },
    "magnitudes only": {"target_modules": ["q_proj"], "magnitude_only_modules": ["up_proj", "v_proj"]},
    "magnitudes only, patterns": {
        "target_modules": r".*\.(q|v)_proj",
        "magnitude_only_modules": r".*\.up_proj",
        "rank_pattern": {r".*\.v_proj": 3},
        "use_rslora": True,
    },
    "magnitudes of all": {"target_modules": ["q_proj"], "magnitude_only_modules": "all-linear"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}
