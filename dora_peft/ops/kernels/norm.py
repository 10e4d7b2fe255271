"""Triton kernels that check and refresh v = ||W0 + s B A||, reading a dense or 4-bit W0 once and writing [out] numbers.

    v^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

W0 A^T runs on the matrix units with the precision of fp32: three tf32 products, in which a bf16, fp16 or dequantised
4-bit element is exact. Rows whose sum cancels are computed again from W0 + s B A, decided inside the kernel.

`checked_norm` decides on the device whether v is due, so that nothing waits for the host and a captured CUDA graph
decides again in each replay: one kernel sums a mixture of every bit of A and B and of a sample of W0 with its place,
the other computes v if the sums differ from those of the last time, and hands out the v that it remembers if not.
See norms/ for when this is used. Importing this module imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from ..constants import CANCELLATION
from .elements import elements, stored_arguments
from .launch import Kernel
from .tuning import cdiv, ranks_at_once

# Elements of W0 that every check sums.
SAMPLE = 1024


@triton.jit
def _mixed(place, bits):
    """64 bits of which each depends on every bit of `place` and `bits` [n], by the finaliser of MurmurHash3.

    A sum of them differs from that of other bits or places; sums of the bits alone do not if signs change in pairs or
    numbers change places.
    """
    word = (place.to(tl.int64) << 32) ^ (bits.to(tl.int64) & 0xFFFFFFFF)
    # the masks make arithmetic shifts logical ones
    word = (word ^ ((word >> 33) & 0x7FFFFFFF)) * -49064778989728563
    word = (word ^ ((word >> 33) & 0x7FFFFFFF)) * -4265267296055464877
    return word ^ ((word >> 33) & 0x7FFFFFFF)


@Kernel
@triton.jit
def _digest(lora_A, lora_B, weight, sums, count_A, count_B, count_W, start, step, BLOCK: tl.constexpr):
    """Adds to sums[0], [1] and [2] what A, B and the sample of W0 hold."""
    blocks_A = tl.cdiv(count_A, BLOCK)
    blocks_B = tl.cdiv(count_B, BLOCK)
    first = tl.program_id(0)
    second = first - blocks_A
    third = second - blocks_B
    lanes = tl.arange(0, BLOCK)
    place = first * BLOCK + lanes
    inside = (first < blocks_A) & (place < count_A)
    word = _mixed(place, tl.load(lora_A + place, inside, other=0))
    tl.atomic_add(sums, tl.sum(tl.where(inside, word, 0), 0), mask=first < blocks_A)
    place = second * BLOCK + lanes
    inside = (second >= 0) & (second < blocks_B) & (place < count_B)
    word = _mixed(place, tl.load(lora_B + place, inside, other=0))
    tl.atomic_add(sums + 1, tl.sum(tl.where(inside, word, 0), 0), mask=(second >= 0) & (second < blocks_B))
    place = third * BLOCK + lanes
    inside = (third >= 0) & (place < count_W)
    word = _mixed(place, tl.load(weight + start + place.to(tl.int64) * step, inside, other=0))
    tl.atomic_add(sums + 2, tl.sum(tl.where(inside, word, 0), 0), mask=third >= 0)


@triton.jit
def _value(
    weight, absmax, code, lora_A, lora_B, product, base, rows, in_rows, width, rank, scaling,
    w_row, w_column, blocksize,
    SQUARES: tl.constexpr, CANCELS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
    PRECISION: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v and ||W0||^2 of `rows` [ROWS]; the latter read from `base`, or with SQUARES computed."""
    cross = tl.zeros((ROWS,), tl.float32)
    change = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    lost = tl.zeros((ROWS,), tl.float32)
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
            if SQUARES:
                # summed with what each addition lost (Kahan): a row has thousands of elements
                part = tl.sum(left * left, 1) * (start == 0) - lost
                sum_so_far = squares + part
                lost = (sum_so_far - squares) - part
                squares = sum_so_far
        place = rows[:, None] * rank + ranks[None, :]
        inside = in_rows[:, None] & (ranks < rank)[None, :]
        factor = tl.load(lora_B + place, inside, other=0.0)
        cross += tl.sum(total * factor, 1)
        change += tl.sum(tl.load(product + place, inside, other=0.0) * factor, 1)
    if not SQUARES:
        squares = tl.load(base + rows, in_rows, other=1.0)
    # ||W0||^2 + s^2 ||BA||^2
    sizes = squares + scaling * scaling * change
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
    return tl.sqrt(tl.maximum(squared, 0.0)), squares


@Kernel
@triton.jit
def _norm(
    weight, absmax, code, lora_A, lora_B, product, base, out, height, width, rank, scaling, w_row, w_column, blocksize,
    CANCELS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < height
    value, _ = _value(
        weight, absmax, code, lora_A, lora_B, product, base, rows, in_rows, width, rank, scaling, w_row, w_column,
        blocksize, False, CANCELS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, ROWS, BLOCK,
    )  # fmt: skip
    tl.store(out + rows, value, in_rows)


@Kernel
@triton.jit(do_not_specialize=["due", "compared"])
def _checked_norm(
    weight, absmax, code, lora_A, lora_B, product, sums, known, remembered, out, due, compared,
    height, width, rank, scaling,
    w_row, w_column, blocksize,
    CANCELS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < height
    changed = due != 0
    for number in range(compared):
        changed = changed | (tl.load(sums + number) != tl.load(known + number))
    if changed:
        value, squares = _value(
            weight, absmax, code, lora_A, lora_B, product, out, rows, in_rows, width, rank, scaling, w_row, w_column,
            blocksize, True, CANCELS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, ROWS, BLOCK,
        )  # fmt: skip
        # rounding level of ||W0||: v that vanishes over W0 != 0 is not divided by
        value = tl.maximum(value, tl.maximum(tl.sqrt(squares) * EPSILON, 1e-30))
        tl.store(remembered + rows, value, in_rows)
        tl.store(out + rows, value, in_rows)
        tl.atomic_add(known + 4, 1, mask=tl.program_id(0) == 0)
        # what is remembered may belong to another W0 now than the sum of all of it
        stale = (compared == 3) & ((due != 0) | (tl.load(sums + 2) != tl.load(known + 2)))
        tl.atomic_add(known + 3, 1, mask=(tl.program_id(0) == 0) & stale)
    else:
        tl.store(out + rows, tl.load(remembered + rows, in_rows, other=1.0), in_rows)


def row_norms(stored: Tensor | FourBit, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out], fp32; not floored.

    Args:
        stored: W0 as `BaseWeight.stored` gives it.
        base_squared: ||W0||^2 per row [out], fp32.
        lora_A, lora_B: [r, in] and [out, r], fp32.
    """
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    # [out, r]
    product = lora_B @ (lora_A @ lora_A.T)
    (height, rank), width = lora_B.shape, lora_A.shape[1]
    out = torch.empty_like(base_squared)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    rows = 64 if height >= 4096 else 16
    _norm[(cdiv(height, rows),)](
        weight, absmax, code, lora_A, lora_B, product, base_squared, out, height, width, rank, scaling, *layout,
        CANCELS=CANCELLATION, **options,
        PRECISION="ieee" if torch.version.hip else "tf32x3", RANKS=ranks_at_once(rank), ROWS=rows, BLOCK=64,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


class Memory:
    """What a device remembers of one v between forward passes. Written by the check alone, and saved by no graph.

    Attributes:
        known: The sums of A, B, W0's sample and all of W0 that `remembered` belongs to, and how often it was computed:
            int64 [5].
        remembered: v [out], fp32.
    """

    def __init__(self, height: int, device: torch.device) -> None:
        self.known = torch.zeros(5, dtype=torch.int64, device=device)
        self.remembered = torch.empty(height, dtype=torch.float32, device=device)


def checked_norm(
    memory: Memory,
    stored: Tensor | FourBit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    original: tuple[Tensor, Tensor],
    *,
    due: bool,
    another: bool,
) -> Tensor:
    """A new v [out], fp32 and floored, computed if `due` or if A, B or W0 hold something new, as far as is looked.

    Args:
        memory: What was computed before.
        stored: W0 as `BaseWeight.stored` gives it.
        lora_A, lora_B: [r, in] and [out, r], fp32.
        original: A and B as stored, whose bits are summed.
        due: Whether something else changed that the host knows: s, or W0's version.
        another: Whether W0 is another tensor than before, so that all of it is looked at instead of a sample.
    """
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    # [out, r]
    product = lora_B @ (lora_A @ lora_A.T)
    (height, rank), width = lora_B.shape, lora_A.shape[1]
    sums = torch.zeros(4, dtype=torch.int64, device=lora_A.device)
    bits_A, bits_B = (_bits(factor.contiguous()) for factor in original)
    bits_W = _bits(stored.packed if isinstance(stored, FourBit) else stored)
    step = max(1, bits_W.numel() // SAMPLE)
    _sum(bits_A, bits_B, bits_W, sums, min(SAMPLE, bits_W.numel()), (step // 3) | 1 if step > 1 else 0, step)
    # an evaluation on some processors rounds the statistics of a 4-bit weight
    if isinstance(stored, FourBit):
        scales, stride = stored.absmax, max(1, stored.absmax.numel() // SAMPLE)
        _sum(bits_A[:0], bits_B[:0], _bits(scales), sums, min(SAMPLE, scales.numel()), 0, stride)
    if another:
        _sum(bits_A[:0], bits_B[:0], bits_W, sums[1:], bits_W.numel(), 0, 1)
    looked_at = 4 if another else 3
    out = torch.empty_like(memory.remembered)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    rows = 64 if height >= 4096 else 16
    _checked_norm[(cdiv(height, rows),)](
        weight, absmax, code, lora_A, lora_B, product, sums, memory.known, memory.remembered, out, int(due),
        looked_at, height, width, rank, scaling, *layout,
        CANCELS=CANCELLATION, **options,
        PRECISION="ieee" if torch.version.hip else "tf32x3", RANKS=ranks_at_once(rank), ROWS=rows, BLOCK=64,
        EPSILON=torch.finfo(torch.float32).eps, num_warps=4, num_stages=2,
    )  # fmt: skip
    memory.known[:looked_at].copy_(sums[:looked_at])
    return out


def _sum(bits_A: Tensor, bits_B: Tensor, bits_W: Tensor, sums: Tensor, count: int, start: int, step: int) -> None:
    block = 1024
    blocks = cdiv(bits_A.numel(), block) + cdiv(bits_B.numel(), block) + cdiv(count, block)
    _digest[(blocks,)](
        bits_A, bits_B, bits_W, sums, bits_A.numel(), bits_B.numel(), count, start, step, BLOCK=block, num_warps=4
    )


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers, a matrix of columns as one of rows."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    tensor = tensor.detach()
    flat = tensor if tensor.is_contiguous() else tensor.T
    return flat.reshape(-1).view(kinds[tensor.dtype.itemsize])
