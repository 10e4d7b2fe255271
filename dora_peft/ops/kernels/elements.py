"""What kernels of several files are made of: products, rounding, and the elements of a stored W0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from .tuning import INTERPRETED

# The interpreter multiplies the bit patterns of bf16.
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right in fp32, `right` in the dtype of `left`."""
    right = right if right.dtype == left.dtype else narrow(right.to(tl.float32), left.dtype)
    if _UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """fp32 `value` in DTYPE, rounded to nearest; the interpreter's own conversion to bf16 cuts digits off."""
    if _UPCAST and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        # without the digits that are to go: of subnormal numbers, as 0 would be one, it keeps others
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def elements(
    weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize,
    FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
):  # fmt: skip
    """W0 [len(rows), len(columns)] in fp32, rounded as dequantisation does."""
    index = rows[:, None].to(tl.int64) * w_row + columns[None, :].to(tl.int64) * w_column
    if FOUR_BIT:
        byte = tl.load(weight + index // 2, inside, other=0).to(tl.int32)
        nibble = tl.where(index % 2 == 0, byte >> 4, byte & 15)
        value = tl.load(code + nibble) * tl.load(absmax + index // blocksize, inside, other=0.0)
        if HALF:
            value = value.to(tl.float16).to(tl.float32)
        if BRAIN:
            value = narrow(value, tl.bfloat16).to(tl.float32)
        return value
    return tl.load(weight + index, inside, other=0.0).to(tl.float32)


def stored_arguments(
    stored: Tensor | FourBit, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int], dict[str, bool]]:
    """What `elements` reads W0 from, as a kernel's arguments.

    Args:
        stored: See `BaseWeight.stored`.
        unused: Stands for tensors that are not read.

    Returns:
        The weight's data, statistics and code, its strides and quantisation block, and the constants.
    """
    if isinstance(stored, FourBit):
        options = {"FOUR_BIT": True, "HALF": stored.dtype is torch.float16, "BRAIN": stored.dtype is torch.bfloat16}
        return stored.packed, stored.absmax, stored.code, (stored.shape[1], 1, stored.blocksize), options
    row, column = stored.stride()
    return stored, unused, unused, (row, column, 1), {"FOUR_BIT": False, "HALF": False, "BRAIN": False}
