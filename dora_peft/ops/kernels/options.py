"""What the linear layer's kernels are given besides tensors. Importing this file alone does not import Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What a dropout mask is drawn from: a number, or an int64 tensor [1] on the device.
Seed = int | Tensor
# What `tl.dot` multiplies fp32 by: one tf32 product, three of them that keep fp32's digits, or fp32 itself.
Precision = Literal["tf32", "tf32x3", "ieee"]
# What `tl.dot` multiplies fp32 by where it may not round to tf32: the sum of three tf32 products. Each factor is split
# into two tf32 numbers, which hold 22 of its 24 bits, and the product of the two small ones is left out: 2^-21 of a
# term at most. Over 16, 64 and 384 terms the sum is 1.1e-7, 1.6e-7 and 2.5e-7 off float64, relative to its norm, where
# fp32's own is 0.7e-7, 1.5e-7 and 2.5e-7 off, and that of one tf32 product 3e-4 (tests/ops/kernels/test_tf32.py).
# "ieee" multiplies by scalar instructions, from arrays of 2.6 to 11 KB of stack a thread above 32 ranks.
EXACT_FP32: Precision = "ieee" if torch.version.hip else "tf32x3"


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What `fused.forward` and `fused.gradients` are given besides tensors.

    Attributes:
        k: s / (1 - p), by the exact probability to keep an element.
        p: Probability to drop an element of x before A.
        seed: Of the dropout mask, None without dropout.
        needed: Whether x, base_out, bias, A, B and c need a gradient.
    """

    k: float
    p: float
    seed: Seed | None
    needed: tuple[bool, ...]

    @classmethod
    def of(cls, scaling: float, p: float, seed: Seed | None, needed: tuple[bool, ...]) -> KernelOptions:
        """The options for s = `scaling`."""
        kept = 1.0 if seed is None else threshold(p)[1]
        return cls(scaling / kept if kept else 0.0, p, seed, needed)


def threshold(p: float) -> tuple[int, float]:
    """The number of the 2^16 draws that are dropped, and the exact probability to keep an element."""
    dropped = round(p * 2**16)
    return dropped, 1 - dropped / 2**16


def precision(dtype: torch.dtype) -> Precision:
    """What `tl.dot` multiplies `dtype` in: fp32 as torch's own products on a GPU do, the rest as it is.

    torch keeps two settings of it. The older, `allow_tf32`, raises once the newer has been set; the newer holds what
    either has set, and is not there before torch 2.9.
    """
    if dtype is not torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else EXACT_FP32
