"""v for torch.compile: the check of state.py as an operator, which to the compiler is a function without side effects.

It returns a new v each time, and remembers inside, by content. Declaring a buffer that it writes would fail under
Inductor with two forward passes before a backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .state import layers, settle, weight_norm


@torch.library.custom_op("dora_peft::weight_norm", mutates_args=())
def _weight_norm(
    lora_A: Tensor,
    lora_B: Tensor,
    weight: Tensor | None,
    scaling: float,
    layer: int,
    adapter: str,
    out_features: int,
    double: bool,
) -> Tensor:
    owner = layers.get(layer)
    if owner is None:
        raise RuntimeError("A compiled graph outlived the DoRA layer that it was made of. Compile the model again.")
    own = owner.original_weight()
    if weight is not None and isinstance(own, Tensor) and own.data_ptr() == weight.data_ptr():
        weight = own  # the graph's alias of it
    return weight_norm(owner, adapter, (lora_A, lora_B), scaling, weight).value.clone()


@_weight_norm.register_fake
def _(lora_A, lora_B, weight, scaling, layer, adapter, out_features, double):
    return lora_A.new_empty(out_features, dtype=torch.float64 if double else torch.float32)


@torch.compiler.assume_constant_result  # torch.compile runs it as it is, while it traces
def _settled(layer: int, adapter: str) -> bool:
    return settle(layers[layer], adapter).settled


def traced(layer: Any, adapter: str) -> tuple[Tensor, Tensor | None]:
    """v [out] without gradient and the tied rows, while torch.compile traces the layer."""
    _settled(layer.number, adapter)
    lora_A, lora_B = layer.factor_parameters(adapter)
    stored = layer.original_weight()
    plain = type(stored) in (Tensor, nn.Parameter) and stored.is_floating_point()
    value = torch.ops.dora_peft.weight_norm(
        lora_A.detach(),
        lora_B.detach(),
        stored.detach() if plain else None,
        float(layer.scaling[adapter]),
        layer.number,
        adapter,
        layer.magnitude(adapter).numel(),
        plain and stored.dtype is torch.float64,
    )
    return value, layer._norms[adapter].tied
