"""Triton kernels that check and refresh v = ||W0 + s B A||, reading a dense or 4-bit W0 once and writing [out] numbers.

A program composes W0 + s B A a block of columns at a time and sums its squares: nothing cancels, W0 is read once whatever
the rank, and no block leaves the processor. B A runs on the matrix units with the precision of fp32, as three tf32
products. The columns are split over programs so that a layer fills the processor; of the programs of some rows the last
to arrive adds up what all of them found, in the order of their columns, so that v is the same in every run.

`checked_norm` decides on the device whether v is due, so that nothing waits for the host and a captured CUDA graph
decides again in each replay: one kernel sums a mixture of every bit of A and B and of a sample of W0 with its place,
the other computes v if the sums differ from those of the last time, and hands out the v that it remembers if not.
grouped_norm.py does the same for all layers of a model at once. See norms/ for when this is used. Importing this module
imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from .elements import elements, narrow, stored_arguments
from .tuning import INTERPRETED, ranks_at_once

# Elements of W0 that every check sums.
SAMPLE = 1024
# Rows and columns of a block. The matrix units of Hopper take 64 rows at least.
ROWS, BLOCK = 64, 64
# Programs that a layer is split into if it is large enough, twice the processors of an H100, and the fewest columns
# that one takes.
_PROGRAMS, _LEAST = 264, 512
# How `_span` reads W0: any strides or nibbles; along its rows or columns, or whole quantisation blocks, in 16 bytes.
ANY, ALONG_ROWS, ALONG_COLUMNS, NIBBLES = range(4)


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


@triton.jit
def mixed_sum(bits, block, count, start, step, SIZE: tl.constexpr):
    """The sum over one block of `count` whole numbers from `start` on, `step` apart, each mixed with its place."""
    place = block * SIZE + tl.arange(0, SIZE)
    inside = place < count
    word = _mixed(place, tl.load(bits + start + place.to(tl.int64) * step, inside, other=0))
    return tl.sum(tl.where(inside, word, 0), 0)


@triton.jit
def _digest(lora_A, lora_B, weight, sums, count_A, count_B, count_W, start, step, SIZE: tl.constexpr):
    """Adds to sums[0], [1] and [2] what A, B and the sample of W0 hold."""
    blocks_A = tl.cdiv(count_A, SIZE)
    blocks_B = tl.cdiv(count_B, SIZE)
    block = tl.program_id(0)
    if block < blocks_A:
        tl.atomic_add(sums, mixed_sum(lora_A, block, count_A, 0, 1, SIZE))
    elif block < blocks_A + blocks_B:
        tl.atomic_add(sums + 1, mixed_sum(lora_B, block - blocks_A, count_B, 0, 1, SIZE))
    else:
        tl.atomic_add(sums + 2, mixed_sum(weight, block - blocks_A - blocks_B, count_W, start, step, SIZE))


@triton.jit
def _span(
    weight, absmax, code, lora_A, lora_B, rows, in_rows, first, last, width, rank, scaling, w_row, w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum (W0 + s B A)^2 over columns first to last of `rows` [ROWS]. WHOLE: RANKS are all ranks."""
    lanes = tl.arange(0, BLOCK)
    factors_B = lora_B + rows[:, None].to(tl.int64) * rank
    factor = tl.zeros((ROWS, RANKS), tl.float32)
    if WHOLE:
        ranks = tl.arange(0, RANKS)
        inside = in_rows[:, None] & (ranks < rank)[None, :]
        factor = scaling * tl.load(factors_B + ranks[None, :], inside, other=0.0).to(tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, BLOCK):
        columns = start + lanes
        inside = in_rows[:, None] & (columns < width)[None, :]
        if READS == 3:
            # a byte holds two neighbours; BLOCK columns lie in one quantisation block
            halves = start // 2 + tl.arange(0, BLOCK // 2)
            place = rows[:, None].to(tl.int64) * (width // 2) + halves[None, :]
            byte = tl.load(tl.multiple_of(weight + place, [1, 16]), in_rows[:, None], other=0).to(tl.int32)
            statistic = tl.load(absmax + (rows.to(tl.int64) * width + start) // blocksize, in_rows, other=0.0)
            pairs = tl.join(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15)))
            composed = tl.reshape(pairs, (ROWS, BLOCK)) * statistic[:, None]
            if HALF:
                composed = composed.to(tl.float16).to(tl.float32)
            if BRAIN:
                composed = narrow(composed, tl.bfloat16).to(tl.float32)
        elif READS == 1:
            places = weight + rows[:, None].to(tl.int64) * w_row + columns[None, :]
            composed = tl.load(tl.multiple_of(places, [1, 16]), inside, other=0.0).to(tl.float32)
        elif READS == 2:
            places = weight + rows[:, None] + columns[None, :].to(tl.int64) * w_column
            composed = tl.load(tl.multiple_of(places, [16, 1]), inside, other=0.0).to(tl.float32)
        else:
            composed = elements(
                weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
            )
        if WHOLE:
            places = lora_A + tl.arange(0, RANKS)[:, None] * width + columns[None, :]
            in_A = (tl.arange(0, RANKS) < rank)[:, None] & (columns < width)[None, :]
            right = tl.load(places, in_A, other=0.0).to(tl.float32)
            composed += tl.dot(factor, right, input_precision=PRECISION)
        else:
            for begin in range(0, rank, RANKS):
                ranks = begin + tl.arange(0, RANKS)
                left = tl.load(
                    factors_B + ranks[None, :], in_rows[:, None] & (ranks < rank)[None, :], other=0.0
                ).to(tl.float32)  # fmt: skip
                right = tl.load(
                    lora_A + ranks[:, None] * width + columns[None, :],
                    (ranks < rank)[:, None] & (columns < width)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                composed = tl.dot(scaling * left, right, composed, input_precision=PRECISION)
        squares += tl.sum(composed * composed, 1)
    return squares


@triton.jit
def _base_squares(
    weight, absmax, code, rows, in_rows, width, w_row, w_column, blocksize,
    FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """||W0||^2 of `rows` [ROWS], read again: needed only when W0 has changed."""
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = in_rows[:, None] & (columns < width)[None, :]
        value = elements(
            weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
        )
        squares += tl.sum(value * value, 1)
    return squares


@triton.jit
def norm_of_rows(
    weight, absmax, code, lora_A, lora_B, partial, arrived, base, block, span, spans, columns, height, width, rank,
    scaling, w_row, w_column, blocksize, base_due,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """v of a block of rows [ROWS], and whether this program is the last of theirs to arrive, which alone has it.

    Args:
        partial: fp32 [spans, height], for sums of squares.
        arrived: int32 [row blocks] of zeros, which are zeros again afterwards.
        base: ||W0||^2 [height], computed if `base_due`; not used if EPSILON is 0.
        block, span: Which rows and columns.
        spans, columns: How many spans there are, of how many columns.
    """
    rows = block * ROWS + tl.arange(0, ROWS)
    in_rows = rows < height
    first = span * columns
    squares = _span(
        weight, absmax, code, lora_A, lora_B, rows, in_rows, first, tl.minimum(first + columns, width), width, rank,
        scaling, w_row, w_column, blocksize, READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK,
    )  # fmt: skip
    last = spans == 1
    if spans > 1:
        tl.store(partial + span.to(tl.int64) * height + rows, squares, in_rows)
        # what all threads have stored is there before the program is counted
        tl.debug_barrier()
        last = tl.atomic_add(arrived + block, 1) == spans - 1
        tl.debug_barrier()
        if last:
            tl.store(arrived + block, 0)
            squares = tl.zeros((ROWS,), tl.float32)
            for number in range(spans):
                # past the first cache, which other programs' stores do not reach
                squares += tl.load(
                    partial + number.to(tl.int64) * height + rows, in_rows, other=0.0, cache_modifier=".cg"
                )
    value = tl.sqrt(squares)
    if EPSILON > 0:
        if last:
            known = tl.zeros((ROWS,), tl.float32)
            if base_due:
                known = _base_squares(
                    weight, absmax, code, rows, in_rows, width, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN,
                    ROWS, BLOCK,
                )  # fmt: skip
                tl.store(base + rows, known, in_rows)
            else:
                known = tl.load(base + rows, in_rows, other=0.0)
            # rounding level of ||W0||: v that vanishes over W0 != 0 is not divided by
            value = tl.maximum(value, tl.maximum(tl.sqrt(known) * EPSILON, 1e-30))
    return value, rows, in_rows, last


@triton.jit
def conclude(known, found, base_due, compared):
    """Remember the sums that v now belongs to, and count. Called once a refresh, after all of it."""
    for number in range(compared):
        tl.store(known + number, tl.load(found + number))
    if base_due & (compared == 3):
        # what is remembered may belong to another W0 now than the sum of all of it
        tl.store(known + 3, tl.load(known + 3) + 1)
    tl.store(known + 4, tl.load(known + 4) + 1)


@triton.jit
def _norm(
    weight, absmax, code, lora_A, lora_B, partial, arrived, out, spans, columns, height, width, rank, scaling, w_row,
    w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value, rows, in_rows, last = norm_of_rows(
        weight, absmax, code, lora_A, lora_B, partial, arrived, out, tl.program_id(0) // spans,
        tl.program_id(0) % spans, spans, columns, height, width, rank, scaling, w_row, w_column, blocksize, False,
        READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK, 0.0,
    )  # fmt: skip
    if last:
        tl.store(out + rows, value, in_rows)


@triton.jit(do_not_specialize=["due", "compared"])
def _checked_norm(
    weight, absmax, code, lora_A, lora_B, partial, arrived, sums, known, remembered, base, out, due, compared, spans,
    columns, height, width, rank, scaling, w_row, w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // spans
    changed = due != 0
    for number in range(compared):
        changed = changed | (tl.load(sums + number) != tl.load(known + number))
    if changed:
        base_due = due != 0
        for number in range(2, compared):
            base_due = base_due | (tl.load(sums + number) != tl.load(known + number))
        value, rows, in_rows, last = norm_of_rows(
            weight, absmax, code, lora_A, lora_B, partial, arrived, base, block, tl.program_id(0) % spans, spans,
            columns, height, width, rank, scaling, w_row, w_column, blocksize, base_due, READS, FOUR_BIT, HALF, BRAIN,
            PRECISION, RANKS, WHOLE, ROWS, BLOCK, EPSILON,
        )  # fmt: skip
        if last:
            tl.store(remembered + rows, value, in_rows)
            tl.store(out + rows, value, in_rows)
            blocks = tl.cdiv(height, ROWS)
            # by now no program has yet to compare
            if tl.atomic_add(arrived + blocks, 1) == blocks - 1:
                conclude(known, sums, base_due, compared)
    elif tl.program_id(0) % spans == 0:
        rows = block * ROWS + tl.arange(0, ROWS)
        tl.store(out + rows, tl.load(remembered + rows, rows < height, other=1.0), rows < height)


def reads(stored: Tensor | FourBit) -> int:
    """How `_span` may read a stored W0: in 16 bytes at a time only where its layout allows it."""
    if isinstance(stored, FourBit):
        whole = stored.shape[1] % BLOCK == 0 and stored.blocksize % BLOCK == 0 and stored.packed.data_ptr() % 16 == 0
        return NIBBLES if whole else ANY
    (height, width), (row, column) = stored.shape, stored.stride()
    aligned = stored.data_ptr() % 16 == 0
    if aligned and column == 1 and row % 16 == 0 and width % 16 == 0:
        return ALONG_ROWS
    return ALONG_COLUMNS if aligned and row == 1 and column % 16 == 0 and height % 16 == 0 else ANY


def division(height: int, width: int) -> tuple[int, int]:
    """Into how many spans of how many columns the work on each block of rows is split."""
    blocks = triton.cdiv(height, ROWS)
    spans = max(1, min(triton.cdiv(_PROGRAMS, blocks), width // _LEAST))
    columns = triton.cdiv(triton.cdiv(width, spans), BLOCK) * BLOCK
    return triton.cdiv(width, columns), columns


def constants(stored: Tensor | FourBit, rank: int) -> dict[str, object]:
    """The constants of the kernels of this file that depend on W0's layout and on the rank, and how they run."""
    ranks = ranks_at_once(rank)
    precision = "ieee" if torch.version.hip else "tf32x3"
    # a stage holds a block of A and, if it feeds the matrix units, of W0
    stages = 4 if ranks <= 32 else 3
    return {
        "READS": reads(stored), "PRECISION": precision, "RANKS": ranks, "WHOLE": rank <= ranks, "ROWS": ROWS,
        "BLOCK": BLOCK, "num_warps": 4, "num_stages": 2 if INTERPRETED else stages,
    }  # fmt: skip


def row_norms(stored: Tensor | FourBit, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out], fp32; not floored.

    Args:
        stored: W0 as `BaseWeight.stored` gives it.
        base_squared: ||W0||^2 per row [out], fp32.
        lora_A, lora_B: [r, in] and [out, r].
    """
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    (height, rank), width = lora_B.shape, lora_A.shape[1]
    out = torch.empty_like(base_squared)
    spans, columns = division(height, width)
    blocks = triton.cdiv(height, ROWS)
    arrived = torch.zeros(blocks, dtype=torch.int32, device=out.device)
    partial = torch.empty(spans * height if spans > 1 else 1, dtype=torch.float32, device=out.device)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    _norm[(blocks * spans,)](
        weight, absmax, code, lora_A, lora_B, partial, arrived, out, spans, columns, height, width, rank, scaling,
        *layout, **options, **constants(stored, rank),
    )  # fmt: skip
    return out


class Memory:
    """What a device remembers of one v between forward passes. Written by the check alone, and saved by no graph.

    Attributes:
        known: The sums of A, B, W0's sample and all of W0 that `remembered` belongs to, and how often it was computed:
            int64 [5].
        remembered: v [out], fp32.
        base: ||W0||^2 [out], fp32.
    """

    def __init__(self, height: int, device: torch.device) -> None:
        self.known = torch.zeros(5, dtype=torch.int64, device=device)
        self.remembered = torch.empty(height, dtype=torch.float32, device=device)
        self.base = torch.empty(height, dtype=torch.float32, device=device)


def checked_norm(
    memory: Memory,
    stored: Tensor | FourBit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    due: bool,
    another: bool,
) -> Tensor:
    """A new v [out], fp32 and floored, computed if `due` or if A, B or W0 hold something new, as far as is looked.

    Args:
        memory: What was computed before.
        stored: W0 as `BaseWeight.stored` gives it.
        lora_A, lora_B: [r, in] and [out, r] as stored, in any dtype.
        due: Whether something else changed that the host knows: s, or W0's version.
        another: Whether W0 is another tensor than before, so that all of it is looked at instead of a sample.
    """
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    (height, rank), width = lora_B.shape, lora_A.shape[1]
    spans, columns = division(height, width)
    blocks = triton.cdiv(height, ROWS)
    # the sums, and as int32 who has arrived
    zeros = torch.zeros(4 + triton.cdiv(blocks + 1, 2), dtype=torch.int64, device=lora_A.device)
    sums, arrived = zeros[:4], zeros[4:].view(torch.int32)
    bits_A, bits_B = bits(lora_A), bits(lora_B)
    bits_W = bits(stored.packed if isinstance(stored, FourBit) else stored)
    _sum(bits_A, bits_B, bits_W, sums, *sample_of(bits_W))
    # an evaluation on some processors rounds the statistics of a 4-bit weight
    if isinstance(stored, FourBit):
        scales, stride = stored.absmax, max(1, stored.absmax.numel() // SAMPLE)
        _sum(bits_A[:0], bits_B[:0], bits(scales), sums, min(SAMPLE, scales.numel()), 0, stride)
    if another:
        _sum(bits_A[:0], bits_B[:0], bits_W, sums[1:], bits_W.numel(), 0, 1)
    out = torch.empty_like(memory.remembered)
    partial = torch.empty(spans * height if spans > 1 else 1, dtype=torch.float32, device=out.device)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    _checked_norm[(blocks * spans,)](
        weight, absmax, code, lora_A, lora_B, partial, arrived, sums, memory.known, memory.remembered, memory.base,
        out, int(due), 4 if another else 3, spans, columns, height, width, rank, scaling, *layout, **options,
        **constants(stored, rank), EPSILON=torch.finfo(torch.float32).eps,
    )  # fmt: skip
    return out


def sample_of(bits_W: Tensor) -> tuple[int, int, int]:
    """How many elements of W0 every check sums, from where on, how far apart."""
    step = max(1, bits_W.numel() // SAMPLE)
    return min(SAMPLE, bits_W.numel()), (step // 3) | 1 if step > 1 else 0, step


def _sum(bits_A: Tensor, bits_B: Tensor, bits_W: Tensor, sums: Tensor, count: int, start: int, step: int) -> None:
    size = 1024
    blocks = triton.cdiv(bits_A.numel(), size) + triton.cdiv(bits_B.numel(), size) + triton.cdiv(count, size)
    _digest[(blocks,)](
        bits_A, bits_B, bits_W, sums, bits_A.numel(), bits_B.numel(), count, start, step, SIZE=size, num_warps=4
    )


def bits(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers, a matrix of columns as one of rows."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    tensor = tensor.detach()
    flat = tensor if tensor.is_contiguous() else tensor.T
    return flat.reshape(-1).view(kinds[tensor.dtype.itemsize])
