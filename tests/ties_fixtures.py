"""Layers of every kind with zero rows, and trained adapters over them."""

import json

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig

ROWS = [0, 1, 5]
RANGES = [[0, 2], [5, 6]]


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "Conv1D": lambda: Conv1D(8, 8),
    "embedding": lambda: nn.Embedding(12, 8),
    "conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8),
}
RANK = {"depthwise": 8}


def base(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        layer.weight.normal_()
        rows = layer.weight.T if kind in ("Conv1D", "embedding") else layer.weight
        rows[ROWS] = 0
    return One(layer).to(dtype).eval()


def example(kind, dtype=torch.float32):
    torch.manual_seed(1)
    shape = {"conv2d": (2, 8, 4, 4), "grouped": (2, 8, 4, 4), "depthwise": (2, 8, 5)}.get(kind, (3, 8))
    return torch.arange(12).view(3, 4) if kind == "embedding" else torch.randn(shape).to(dtype)


def adapted(kind, dtype=torch.float32, autocast=True, **options):
    config = DoraConfig(**{"r": RANK.get(kind, 4), "lora_alpha": 3, "target_modules": ["layer"], **options})
    return get_peft_model(base(kind, dtype), config, autocast_adapter_dtype=autocast).eval()


@torch.no_grad()
def train(model, zero_rows=True, adapter="default"):
    """As after some steps; without `zero_rows` these have not moved yet."""
    torch.manual_seed(2)
    layer = model.base_model.model.layer
    layer.scale(adapter)
    lora_A, lora_B = layer.factor_parameters(adapter)
    lora_B.add_(0.3 * torch.randn(lora_B.shape))
    if isinstance(layer.get_base_layer(), nn.Embedding):
        lora_A.add_(0.3 * torch.randn(lora_A.shape))
    if not zero_rows:
        lora_B[ROWS] = 0
    m = layer.magnitude(adapter)
    free = [i for i in range(8) if i not in ROWS]
    m.view(-1)[free] *= 1.3
    return model


@torch.no_grad()
def edit(layer, adapter="default"):
    """B changes before anything has been computed with the adapter."""
    layer.factor_parameters(adapter)[1][ROWS] += 0.25


def is_tied(layer, adapter="default"):
    c = layer.scale(adapter).detach().float()
    free = [i for i in range(8) if i not in ROWS]
    return bool((c[ROWS] == 1).all()) and bool((c[free] != 1).all())


def layer_of(model):
    return (model.base_model.model if isinstance(model, PeftModel) else model).layer


def without_record(folder):
    """As an earlier version wrote it."""
    path = folder / "adapter_config.json"
    entries = json.loads(path.read_text())
    for name in ("tied_rows", "filled_rows"):
        del entries["auto_mapping"]["dora_peft"][name]
    path.write_text(json.dumps(entries))
    return folder
