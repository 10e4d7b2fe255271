"""v for torch.compile: the check of state.py as an operator, which to the compiler is a function without side effects.

It returns a new v each time, and remembers inside, by content. Declaring a buffer that it writes would fail under
Inductor with two forward passes before a backward pass.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer
from .state import settle, up_to_date_for

# Layers by number, for operators, which take numbers and tensors only.
_layers: weakref.WeakValueDictionary[int, AdaptedLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: AdaptedLayer) -> int:
    """A number by which operators find `layer`, for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


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
    owner = _layers.get(layer)
    if owner is None:
        raise RuntimeError("A compiled graph outlived the DoRA layer that it was made of. Compile the model again.")
    own = owner.original_weight()
    # the graph holds an alias of the layer's weight, or another tensor in its place
    alias = weight is None or (isinstance(own, Tensor) and own.data_ptr() == weight.data_ptr())
    stored = own if alias or weight is None else weight
    known = up_to_date_for(owner, adapter, (lora_A, lora_B), scaling, stored, stands_in=not alias)
    return known.value.clone()


@_weight_norm.register_fake
def _(lora_A, lora_B, weight, scaling, layer, adapter, out_features, double):
    return lora_A.new_empty(out_features, dtype=torch.float64 if double else torch.float32)


# torch.compile runs it as it is, while it traces.
@torch.compiler.assume_constant_result
def _settled(layer: int, adapter: str) -> bool:
    return settle(_layers[layer], adapter).settled


def traced_ties(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """The rows whose magnitude follows their norm [out, bool], None if there are none, while the layer is traced."""
    _settled(layer.number, adapter)
    return layer._norms[adapter].tied


def traced(layer: AdaptedLayer, adapter: str) -> tuple[Tensor, Tensor | None]:
    """v [out] without gradient and the tied rows, while torch.compile traces the layer."""
    tied = traced_ties(layer, adapter)
    lora_A, lora_B = layer.factor_parameters(adapter)
    stored, scaling = layer.original_weight(), layer.scaling[adapter]
    if isinstance(scaling, Tensor):
        # after prepare_model_for_compiled_hotswap: not a part of the graph
        lora_B, scaling = lora_B * scaling, 1.0
    dense = stored if isinstance(stored, Tensor) and type(stored) in (Tensor, nn.Parameter) else None
    dense = dense if dense is not None and dense.is_floating_point() else None
    value = torch.ops.dora_peft.weight_norm(
        lora_A.detach(),
        lora_B.detach(),
        None if dense is None else dense.detach(),
        float(scaling),
        layer.number,
        adapter,
        layer.magnitude(adapter).numel(),
        dense is not None and dense.dtype is torch.float64,
    )
    return value, tied
