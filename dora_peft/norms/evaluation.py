"""What evaluation keeps beside v: c, the folded s c B and A in the base's dtype, checked by content as v is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional, linear
from ..ops.content import copy_bits, same_bits
from .state import Snapshot, is_checking, weight_norm


@dataclass(frozen=True)
class Folded:
    """c and the factors of one adapter as evaluation multiplies by them.

    Attributes:
        lora_B: s c * B [out, r], in the base's compute dtype.
        c: m / v [out].
        lora_A: A [r, in] in the base's compute dtype, None where A has it already.
        known: What v, A, B and s these belong to.
        magnitude: A copy of m to compare with.
    """

    lora_B: Tensor
    c: Tensor
    lora_A: Tensor | None
    known: Snapshot
    magnitude: Tensor

    def fits(self, known: Snapshot, magnitude: Tensor) -> bool:
        return self.known is known and same_bits(magnitude, self.magnitude)


def folded(layer: Any, adapter: str) -> Folded:
    """What evaluation multiplies by; made again if A, B, m, s or W0 changed, and dropped by `train()`."""
    known = weight_norm(layer, adapter)
    norm, magnitude = layer._norms[adapter], layer.magnitude(adapter)
    kept = norm.folded
    if kept is not None and kept.fits(known, magnitude) and not is_checking():
        return kept
    lora_A, lora_B = layer.factor_parameters(adapter)
    dtype = _compute_dtype(layer, lora_B)
    with torch.inference_mode(False), torch.no_grad():
        copy = copy_bits(magnitude)
        c = functional.scale(copy.view(-1), known.value, known.tied)
        product = linear.fold(lora_B.detach(), c, layer.scaling[adapter]).to(dtype)
        cast_A = None if lora_A.dtype is dtype else lora_A.detach().to(dtype)
    new = Folded(product, c, cast_A, known, copy)
    if not layer.training:  # amid training it would not be worth its memory
        norm.folded = new
    return new


def _compute_dtype(layer: Any, lora_B: Tensor) -> torch.dtype:
    weight = layer.original_weight()
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else lora_B.dtype
