"""Adapted models over bitsandbytes' layers, and what such a layer stores."""

import pytest
import torch
from layer_fixtures import One, dora, perturb
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig


def quantised(bits, **options):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32, **options)
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, **options)
    layer.load_state_dict(plain.state_dict())
    model = get_peft_model(One(layer.to("cpu")), DoraConfig(r=4, lora_alpha=3, target_modules=["layer"]))
    perturb(dora(model), "default")
    return model


def stored(layer):
    """Every tensor of a quantised weight, wherever bitsandbytes keeps it now."""
    weight = layer.weight
    if hasattr(weight, "SCB"):
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return {"data": weight.data.clone(), "SCB": scale.clone()}
    state = weight.quant_state.as_dict(packed=True)
    return {"data": weight.data.clone(), **{key: value.clone() for key, value in state.items()}}
