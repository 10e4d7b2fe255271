"""What evaluation keeps beside v: c, the folded s c B and A in the base's dtype, checked by content as v is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import choice
from ..ops.content import Bits
from ..ops.norm import scale
from ..ops.scaled_sum import fold
from .adapted import AdaptedLayer
from .records import Folded, Snapshot
from .state import is_checking


def folded(layer: AdaptedLayer, adapter: str, known: Snapshot) -> Folded:
    """What evaluation multiplies by; made again if A, B, m, s or W0 changed, and dropped by `train()`.

    Args:
        known: The adapter's norm as `up_to_date` has just given it.
    """
    norm, magnitude = layer._norms[adapter], layer.magnitude(adapter)
    kept = norm.folded
    if kept is not None and kept.fits(known, magnitude) and not is_checking():
        return kept
    lora_A, lora_B = layer.factor_parameters(adapter)
    dtype = _compute_dtype(layer, lora_B)
    with torch.inference_mode(False), torch.no_grad():
        held = Bits(magnitude)
        c = scale(held.copy.view(-1), known.value, known.tied)
        scaling, alpha = float(layer.scaling[adapter]), 1.0
        if not choice.uses_kernels(lora_B.device, dtype):
            scaling, alpha = 1.0, float(scaling)
        product = fold(lora_B.detach(), c, scaling).to(dtype)
        cast_A = None if lora_A.dtype is dtype else lora_A.detach().to(dtype)
    new = Folded(product, alpha, c, cast_A, known, held)
    if not layer.training:
        # amid training it would not be worth its memory
        norm.folded = new
    return new


def _compute_dtype(layer: AdaptedLayer, lora_B: Tensor) -> torch.dtype:
    stored = layer.original_weight()
    return stored.dtype if isinstance(stored, Tensor) and stored.is_floating_point() else lora_B.dtype
