"""What evaluation keeps beside v: c, the folded s c B and A in the base's dtype, checked by content as v is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import functional, linear
from ..ops.content import Bits
from .state import Snapshot, is_checking


@dataclass(frozen=True)
class Folded:
    """c and the factors of one adapter as evaluation multiplies by them.

    Attributes:
        lora_B: s c * B [out, r], in the base's compute dtype.
        c: m / v [out].
        lora_A: A [r, in] in the base's compute dtype, None where A has it already.
        known: What v, A, B and s these belong to.
        magnitude: What m held.
    """

    lora_B: Tensor
    c: Tensor
    lora_A: Tensor | None
    known: Snapshot
    magnitude: Bits

    def fits(self, known: Snapshot, magnitude: Tensor) -> bool:
        return self.known is known and self.magnitude.fits(magnitude)


def folded(layer: Any, adapter: str, known: Snapshot) -> Folded:
    """What evaluation multiplies by; made again if A, B, m, s or W0 changed, and dropped by `train()`.

    Args:
        known: The adapter's norm as `weight_norm` has just given it.
    """
    norm, magnitude = layer._norms[adapter], layer.magnitude(adapter)
    kept = norm.folded
    if kept is not None and kept.fits(known, magnitude) and not is_checking():
        return kept
    lora_A, lora_B = layer.factor_parameters(adapter)
    dtype = _compute_dtype(layer, lora_B)
    with torch.inference_mode(False), torch.no_grad():
        held = Bits(magnitude)
        c = functional.scale(held.copy.view(-1), known.value, known.tied)
        product = linear.fold(lora_B.detach(), c, layer.scaling[adapter]).to(dtype)
        cast_A = None if lora_A.dtype is dtype else lora_A.detach().to(dtype)
    new = Folded(product, c, cast_A, known, held)
    if not layer.training:  # amid training it would not be worth its memory
        norm.folded = new
    return new


def _compute_dtype(layer: Any, lora_B: Tensor) -> torch.dtype:
    weight = layer.original_weight()
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else lora_B.dtype
