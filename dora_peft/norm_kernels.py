"""Triton kernel that refreshes v = ||W0 + s B A||, reading a dense or 4-bit W0 once and writing [out] numbers.

    v^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

W0 A^T runs on the matrix units with the precision of fp32: three tf32 products, in which a bf16, fp16 or dequantised
4-bit element is exact. Rows where the sum cancels are computed again from W0 + s B A, decided inside the kernel, so
that nothing waits for the host. See functional.py for when this is used; importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functional import CANCELLATION
from .kernels import elements, ranks_at_once, stored_arguments


@triton.jit
def _norm(
    weight, absmax, code, lora_A, lora_B, product, base, out, height, width, rank, scaling, w_row, w_column, blocksize,
    CANCELS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < height
    cross = tl.zeros((ROWS,), tl.float32)
    change = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = in_rows[:, None] & (columns < width)[None, :]
            left = elements(
                weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
            )
            right = tl.load(
                lora_A + ranks[None, :] * width + columns[:, None],
                (ranks < rank)[None, :] & (columns < width)[:, None], other=0.0,
            )  # fmt: skip
            total = tl.dot(left, right, total, input_precision=PRECISION)
        place = rows[:, None] * rank + ranks[None, :]
        inside = in_rows[:, None] & (ranks < rank)[None, :]
        factor = tl.load(lora_B + place, inside, other=0.0)
        cross += tl.sum(total * factor, 1)
        change += tl.sum(tl.load(product + place, inside, other=0.0) * factor, 1)
    sizes = tl.load(base + rows, in_rows, other=1.0) + scaling * scaling * change  # ||W0||^2 + s^2 ||BA||^2
    squared = sizes + 2 * scaling * cross
    cancels = in_rows & (squared < CANCELS * sizes)
    if tl.max(cancels.to(tl.int32), 0) > 0:
        dense = tl.zeros((ROWS,), tl.float32)
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, rank, RANKS):
                ranks = start + tl.arange(0, RANKS)
                left = tl.load(
                    lora_B + rows[:, None] * rank + ranks[None, :],
                    in_rows[:, None] & (ranks < rank)[None, :], other=0.0,
                )  # fmt: skip
                right = tl.load(
                    lora_A + ranks[:, None] * width + columns[None, :],
                    (ranks < rank)[:, None] & (columns < width)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(left, right, total, input_precision="ieee")
            inside = in_rows[:, None] & (columns < width)[None, :]
            total = scaling * total + elements(
                weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
            )
            dense += tl.sum(total * total, 1)
        squared = tl.where(cancels, dense, squared)
    tl.store(out + rows, tl.sqrt(tl.maximum(squared, 0.0)), in_rows)


def norm(stored: Any, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out], fp32; not floored.

    Args:
        stored: W0 as a matrix [out, in] of any strides, or as `base_weight.FourBit`.
        base_squared: ||W0||^2 per row [out], fp32.
        lora_A, lora_B: [r, in] and [out, r], fp32.
    """
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    product = lora_B @ (lora_A @ lora_A.T)  # [out, r]
    (height, rank), width = lora_B.shape, lora_A.shape[1]
    out = torch.empty_like(base_squared)
    weight, absmax, code, *layout, options = stored_arguments(stored, out)
    rows = 64 if height >= 4096 else 16
    _norm[(triton.cdiv(height, rows),)](
        weight, absmax, code, lora_A, lora_B, product, base_squared, out, height, width, rank, scaling, *layout,
        CANCELS=CANCELLATION, **options,
        PRECISION="ieee" if torch.version.hip else "tf32x3", RANKS=ranks_at_once(rank), ROWS=rows, BLOCK=64,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
