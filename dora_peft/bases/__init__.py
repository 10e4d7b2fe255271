"""What W0 is: however a base layer stores its weight, `base_weight` makes it look like a [out, in] matrix.

    dense.py         floats: linear layers, transposed ones, embeddings, convolutions with and without groups
    bitsandbytes.py  int8 and 4-bit
    whole.py         HQQ and torchao, dequantised as a whole
    opaque.py        layers that can only be called, such as GPTQ's and AWQ's
    offloaded.py     any of these while accelerate keeps it elsewhere
    scratch.py       memory for the blocks that are read of them

base.py says what a new kind has to provide. Beside the weight itself: inspection.py finds out how to call a layer whose
weight cannot be read, input_gradient.py gives dL/dx to layers that have none, offload.py knows accelerate's hooks,
peft_names.py has the names of PEFT's that are not public.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base import BaseWeight, FourBit
from .bitsandbytes import quantised, unpack_for_gradient
from .dense import Dense, GroupedConv
from .inspection import FLOATS, NOT_TAKEN
from .offload import is_away
from .offloaded import Offloaded
from .opaque import Opaque
from .whole import Dequantized

__all__ = ["BaseWeight", "Dense", "FourBit", "base_weight", "unpack_for_gradient"]


def base_weight(layer: nn.Module, name: str, weight: Tensor | None = None) -> BaseWeight:
    """The seam for a base layer.

    Args:
        layer: The wrapped base layer.
        name: Its module name, for errors.
        weight: Stands in for `layer.weight`: the original one while adapters are merged.

    Returns:
        The first that fits: offloaded, bitsandbytes, dequantised as a whole, dense, opaque.

    Raises:
        ValueError: The layer's weight has a dtype that is neither floating point nor a known quantisation.
    """
    if weight is None and is_away(layer):
        return Offloaded(layer, lambda: _at_hand(layer, name, None))
    return _at_hand(layer, name, weight)


def _at_hand(layer: nn.Module, name: str, given: Tensor | None) -> BaseWeight:
    weight = getattr(layer, "weight", None) if given is None else given
    if seam := quantised(layer, weight):
        return seam
    packed = hasattr(layer, "W_q") or type(weight).__module__.startswith("torchao.")
    if packed:
        try:
            return Dequantized(layer)
        except torch.OutOfMemoryError:
            raise
        # torchao's NF4Tensor has a `dequantize` that takes other arguments; it is called as an opaque layer
        except NOT_TAKEN:
            pass
    if isinstance(weight, Tensor) and weight.dtype in FLOATS and not packed and not hasattr(layer, "qweight"):
        if isinstance(layer, (Conv1D, nn.Embedding)):
            return Dense(weight, Tensor.t)
        groups = getattr(layer, "groups", 1)
        return GroupedConv(weight, groups) if groups > 1 else Dense(weight, lambda w: w.flatten(1))
    # one that holds floats quantises at each call, as quanto's before `freeze`
    plain = isinstance(layer, (nn.Linear, nn.Embedding, Conv1D)) and type(weight).__name__ == "Parameter"
    if plain and isinstance(weight, Tensor) and weight.dtype not in FLOATS:
        raise ValueError(
            f"DoRA cannot adapt module '{name}' ({type(layer).__name__}): expected a weight of dtype float32, "
            f"bfloat16, float16 or float64, or one quantised by bitsandbytes, found {weight.dtype}. Convert the base "
            f"model, or leave the module out with exclude_modules=['{name.rpartition('.')[2]}']."
        )
    out_features, in_features = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if out_features is None or in_features is None:
        raise ValueError(
            f"DoRA cannot adapt module '{name}': {type(layer).__name__} has neither a float weight nor in_features and "
            "out_features. Leave it out with exclude_modules."
        )
    return Opaque(layer, out_features, in_features)
