"""A small MLP and a tiny Llama in float64 with adapters away from their start, and the reference's outputs for them."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, DoraLayer, reference

IDS = torch.arange(12).view(2, 6)


def llama(**changes):
    """A tiny Llama in float64, so that equal means equal to 1e-9, with weights large enough for adapters to show."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**(sizes | heads | tokens | {"initializer_range": 0.3} | changes))
    return LlamaForCausalLM(config).double().eval()


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def mlp():
    torch.manual_seed(0)
    return Mlp().double().eval()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
NAMES = ("up", "down")


def config(**options):
    return DoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": list(NAMES)} | options))


def adapter_parameters(model, adapter):
    """lora_A, lora_B and magnitudes of one adapter, by name."""
    marks = (f".{adapter}.", f".{adapter}")
    return {n: p for n, p in model.named_parameters() if "lora_" in n and (marks[0] in n or n.endswith(marks[1]))}


@torch.no_grad()
def train(model, adapter="default", seed=1):
    """Move one adapter as training would: factors freely, magnitudes by some percent."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, adapter).items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.add_(0.3 * noise)
    return model.eval()


@torch.no_grad()
def output(model, *args, **kwargs):
    """Logits or outputs on fixed inputs of the model's own kind."""
    if not args:
        embeds = any(isinstance(m, nn.Embedding) for m in model.modules())
        args = (IDS,) if embeds else (X,)
    out = model(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.logits


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def differs(found, other):
    assert (found - other).abs().max() > 1e-4


def two_adapters(base=mlp, **options):
    model = train(get_peft_model(base(), config(**options)))
    model.add_adapter("second", config(**(options | {"r": 3, "lora_alpha": 5})))
    train(model, "second", seed=2)
    return model


def dense(layer, adapters):
    """W' of one layer by the reference: c_n (... c_1 (W0 + d_1) ... + d_n), each norm from W0."""
    weight = layer.original_weight().detach()
    merged = weight
    for name in adapters:
        lora_A, lora_B = (t.detach() for t in layer.factors(name))
        magnitude, scaling = layer.lora_magnitude_vector[name].weight.detach(), layer.scaling[name]
        c = magnitude / reference.weight_norm(weight, lora_A, lora_B, scaling)
        merged = c[:, None] * (merged + scaling * lora_B @ lora_A)
    return merged


def dora_layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, DoraLayer)}


def dense_output(model, adapters):
    """The output of a fresh base whose adapted weights are the reference's."""
    plain = mlp()
    with torch.no_grad():
        for name, layer in dora_layers(model).items():
            plain.get_submodule(name).weight.copy_(dense(layer, adapters))
    return output(plain)


def unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    return all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def saved_second(folder, **options):
    """Another adapter for the same modules, saved; returns its outputs."""
    model = train(get_peft_model(mlp(), config(**options)), seed=5)
    model.save_pretrained(folder)
    return output(model)
