"""What the kernels of norm.py and grouped_norm.py are made of: sums of bits, and v of a block of rows.

A program composes W0 + s B A a block of columns at a time and sums its squares: nothing cancels, W0 is read once
whatever the rank, and no block leaves the processor. B A runs on the matrix units with the precision of fp32, as three
tf32 products. The columns are split over programs so that a layer fills the processor; of the programs of some rows the
last to arrive adds up what all of them found, in the order of their columns, so that v is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from .elements import elements, narrow
from .tuning import INTERPRETED, cdiv, ranks_at_once

# Elements of W0 that every check sums.
SAMPLE = 1024
# Rows and the most columns of a block. The matrix units of Hopper take 64 rows at least.
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
def _packed(weight, absmax, rows, in_rows, start, width, blocksize, BLOCK: tl.constexpr):
    """Bytes of two neighbours each [len(rows), BLOCK / 2] from column `start` on, and their statistics [len(rows)]."""
    # BLOCK columns lie in one quantisation block
    place = rows[:, None].to(tl.int64) * (width // 2) + (start // 2 + tl.arange(0, BLOCK // 2))[None, :]
    byte = tl.load(tl.multiple_of(weight + place, [1, 16]), in_rows[:, None], other=0).to(tl.int32)
    return byte, tl.load(absmax + (rows.to(tl.int64) * width + start) // blocksize, in_rows, other=0.0)


@triton.jit
def _block(
    weight, absmax, code, lora_A, factors_B, factor, byte, statistic, rows, in_rows, start, width, rank, scaling, w_row,
    w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum (W0 + s B A)^2 over BLOCK columns from `start` on; `byte` and `statistic` by `_packed` if READS is 3."""
    columns = start + tl.arange(0, BLOCK)
    inside = in_rows[:, None] & (columns < width)[None, :]
    if READS == 3:
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
    return tl.sum(composed * composed, 1)


@triton.jit
def _span(
    weight, absmax, code, lora_A, lora_B, rows, in_rows, first, last, width, rank, scaling, w_row, w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum (W0 + s B A)^2 over columns first to last of `rows` [ROWS]. WHOLE: RANKS are all ranks."""
    factors_B = lora_B + rows[:, None].to(tl.int64) * rank
    factor = tl.zeros((ROWS, RANKS), tl.float32)
    if WHOLE:
        all_ranks = tl.arange(0, RANKS)
        in_factor = in_rows[:, None] & (all_ranks < rank)[None, :]
        factor = scaling * tl.load(factors_B + all_ranks[None, :], in_factor, other=0.0).to(tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    if READS == 1 or READS == 2:
        # A range with stages of its own copies W0 ahead as well as A, which alone feeds a product: rows to shared
        # memory, columns, which lie across what is asked for there, one block ahead to registers.
        for start in tl.range(first, last, BLOCK, num_stages=STAGES if READS == 1 else 2):
            squares += _block(
                weight, absmax, code, lora_A, factors_B, factor, 0, 0, rows, in_rows, start, width, rank, scaling,
                w_row, w_column, blocksize, READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK,
            )  # fmt: skip
    elif READS == 3:
        # it would copy what the code's look-ups give, 4 bytes at a time: loaded ahead by hand. No stages are another
        # loop's: Triton 3.2 does not take None for them
        byte, statistic = _packed(weight, absmax, rows, in_rows, first, width, blocksize, BLOCK)
        for start in range(first, last, BLOCK):
            here, scales = byte, statistic
            # compared row by row: the interpreter of Triton 3.9 takes no mask that combines a number with a row
            ahead = in_rows & (tl.zeros_like(rows) + start + BLOCK < last)
            byte, statistic = _packed(weight, absmax, rows, ahead, start + BLOCK, width, blocksize, BLOCK)
            squares += _block(
                weight, absmax, code, lora_A, factors_B, factor, here, scales, rows, in_rows, start, width, rank,
                scaling, w_row, w_column, blocksize, READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK,
            )  # fmt: skip
    else:
        for start in range(first, last, BLOCK):
            squares += _block(
                weight, absmax, code, lora_A, factors_B, factor, 0, 0, rows, in_rows, start, width, rank, scaling,
                w_row, w_column, blocksize, READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK,
            )  # fmt: skip
    return squares


@triton.jit
def _base_squares(
    weight, absmax, code, rows, in_rows, width, w_row, w_column, blocksize,
    FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """||W0||^2 of `rows` [ROWS], read again: needed only when W0 has changed. A small BLOCK, for few registers."""
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = in_rows[:, None] & (columns < width)[None, :]
        value = elements(weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN)
        squares += tl.sum(value * value, 1)
    return squares


@triton.jit
def norm_of_rows(
    weight, absmax, code, lora_A, lora_B, partial, arrived, base, block, span, spans, columns, height, width, rank,
    scaling, w_row, w_column, blocksize, base_due,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EPSILON: tl.constexpr,
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
    if READS == 2:
        # all of 16 rows or none, as `reads` has seen to: else they could not be read at once
        in_rows = tl.max_constancy(in_rows, 16)
    first = span * columns
    squares = _span(
        weight, absmax, code, lora_A, lora_B, rows, in_rows, first, tl.minimum(first + columns, width), width, rank,
        scaling, w_row, w_column, blocksize, READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK,
        STAGES,
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
            places = partial + rows
            for _ in range(spans):
                # past the first cache, which other programs' stores do not reach
                squares += tl.load(places, in_rows, other=0.0, cache_modifier=".cg")
                places += height
    value = tl.sqrt(squares)
    # one is known to the compiler, the other is not
    if EPSILON > 0:  # noqa: SIM102
        if last:
            known = tl.zeros((ROWS,), tl.float32)
            if base_due:
                known = _base_squares(
                    weight, absmax, code, rows, in_rows, width, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN,
                    ROWS, BLOCK // 4,
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


def reads(stored: Tensor | FourBit) -> int:
    """How `_span` may read a stored W0: in 16 bytes at a time only where its layout allows it."""
    if isinstance(stored, FourBit):
        whole = stored.shape[1] % BLOCK == 0 and stored.blocksize % BLOCK == 0 and stored.packed.data_ptr() % 16 == 0
        return NIBBLES if whole else ANY
    (height, width), (row, column) = stored.shape, stored.stride()
    aligned = stored.data_ptr() % 16 == 0 and width % 16 == 0
    if aligned and column == 1 and row % 16 == 0:
        return ALONG_ROWS
    return ALONG_COLUMNS if aligned and row == 1 and column % 16 == 0 and height % 16 == 0 else ANY


def division(height: int, width: int) -> tuple[int, int]:
    """Into how many spans of how many columns the work on each block of rows is split."""
    blocks = cdiv(height, ROWS)
    spans = max(1, min(cdiv(_PROGRAMS, blocks), width // _LEAST))
    columns = cdiv(cdiv(width, spans), BLOCK) * BLOCK
    return cdiv(width, columns), columns


def constants(stored: Tensor | FourBit, rank: int) -> dict[str, object]:
    """The constants of the kernels of this file that depend on W0's layout and on the rank, and how they run."""
    # above 32 ranks blocks of half the columns, and above 64 products of 32 ranks: larger ones spill on sm_80
    ranks, block = (ranks_at_once(rank) if rank <= 64 else 32), (BLOCK if rank <= 32 else BLOCK // 2)
    precision = "ieee" if torch.version.hip else "tf32x3"
    stages = 2 if INTERPRETED else 4 if rank <= 32 else 3
    how = reads(stored)
    # where nothing is known of W0's layout, the addresses of 4 warps spill: 80 bytes of stack on sm_86
    warps = 8 if how == 0 and rank > 32 else 4
    return {
        "READS": how, "PRECISION": precision, "RANKS": ranks, "WHOLE": rank <= ranks, "ROWS": ROWS, "BLOCK": block,
        "STAGES": stages, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def sample_of(bits_W: Tensor) -> tuple[int, int, int]:
    """How many elements of W0 every check sums, from where on, how far apart."""
    step = max(1, bits_W.numel() // SAMPLE)
    return min(SAMPLE, bits_W.numel()), (step // 3) | 1 if step > 1 else 0, step


def bits(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers, a matrix of columns as one of rows."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    tensor = tensor.detach()
    flat = tensor if tensor.is_contiguous() else tensor.T
    return flat.reshape(-1).view(kinds[tensor.dtype.itemsize])
