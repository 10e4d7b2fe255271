"""The mask of dropout by torch's operations. On a GPU kernels/dropout.py draws it in registers."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """A boolean mask that is False with probability p, and the exact probability of True.

    On a CPU torch draws one number an element, which takes longer than the product that follows. Here each 64-bit
    number serves four elements, so p is rounded to a multiple of 2^-16; dividing by the exact probability keeps the
    expectation.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p), 1 - p
    count, dropped = shape.numel(), round(p * 2**16)
    if dropped == 2**16:
        return torch.zeros(shape, dtype=torch.bool), 0.0
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return (numbers >= dropped - 2**15).view(shape), 1 - dropped / 2**16
