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
# For fp32 where torch's products keep its digits; every other dtype is exact in "ieee", whose name stands for it.
EXACT_FP32: Precision = "ieee"


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
