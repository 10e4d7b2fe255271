"""v = ||W0 + s B A|| of many layers in two launches: whose content has changed, and v of those.

A table on the device says of each layer where A, B and W0 lie. The programs of the first kernel sum a part each of what
the layers hold, as norm.py does for one; the last program of a layer compares the sums with those that the device
remembers, and marks the layer. The second kernel computes v of the marked layers by the same blocks as norm.py, bit for
bit, and hands out the remembered v of the others. Whatever varies between models is in tables, so that a kernel is
compiled once for a layout of W0, a dtype of A and B and a size of ranks. Nothing here waits for the host.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from .elements import stored_arguments
from .launch import Kernel
from .norm import Memory
from .norm_rows import ROWS, SAMPLE, bits, conclude, constants, division, mixed_sum, norm_of_rows, sample_of
from .tuning import cdiv

# Numbers of a row of the table: those of a check from 0 on, those of a refresh from _REFRESH on.
_FIELDS, _REFRESH = tl.constexpr(32), tl.constexpr(12)
# Elements that a program of the check sums.
_SIZE = 2048
# Programs of the refresh for each processor, which holds so many at ranks up to 32: each takes block after block, and
# more would begin when the first end.
_PROGRAMS = 4


@Kernel
@triton.jit
def _check_all(
    table, entries, sums, arrived, known, found, due, like_A, like_W, like_S,
    FOUR_BIT: tl.constexpr, SIZE: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Sums one block of one layer; the last program of the layer sets due[entry].

    Args:
        table: int64 [entries, _FIELDS], see `_row`.
        entries: The layer of each program.
        sums, arrived: int64 [entries, 4] and int32 [entries] of zeros, which are zeros again afterwards.
        known: int64 [entries, 6], see `Memory`.
        found, due: int64 [entries, 4] and int32 [entries], written here.
        like_A, like_W, like_S: Tensors of the whole numbers that A and B, W0 and its statistics are read as.
    """
    entry = tl.load(entries + tl.program_id(0)).to(tl.int64)
    row = table + entry * _FIELDS
    block = tl.program_id(0) - tl.load(row).to(tl.int32)
    count_A, count_B = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    blocks_A, blocks_B = tl.cdiv(count_A, SIZE), tl.cdiv(count_B, SIZE)
    programs = blocks_A + blocks_B + 1
    # of another name for each type: the compiler joins the branches' variables
    if block < blocks_A:
        factor = tl.load(row + 1).to(tl.pointer_type(like_A.dtype.element_ty))
        tl.atomic_add(sums + entry * 4, mixed_sum(factor, block, count_A, 0, 1, SIZE))
    elif block < blocks_A + blocks_B:
        factor = tl.load(row + 2).to(tl.pointer_type(like_A.dtype.element_ty))
        tl.atomic_add(sums + entry * 4 + 1, mixed_sum(factor, block - blocks_A, count_B, 0, 1, SIZE))
    else:
        weight = tl.load(row + 3).to(tl.pointer_type(like_W.dtype.element_ty))
        word = mixed_sum(weight, 0, tl.load(row + 7), tl.load(row + 8), tl.load(row + 9), SAMPLE)
        if FOUR_BIT:
            statistics = tl.load(row + 4).to(tl.pointer_type(like_S.dtype.element_ty))
            word += mixed_sum(statistics, 0, tl.load(row + 10), 0, tl.load(row + 11), SAMPLE)
        tl.atomic_add(sums + entry * 4 + 2, word)
    if tl.atomic_add(arrived + entry, 1) == programs - 1:
        tl.store(arrived + entry, 0)
        changed = 0
        for number in range(3):
            # past the caches, and zero for the next check
            word = tl.atomic_xchg(sums + entry * 4 + number, 0)
            tl.store(found + entry * 4 + number, word)
            changed = changed | (word != tl.load(known + entry * 6 + number)).to(tl.int32)
        tl.store(due + entry, changed)


@Kernel
@triton.jit(do_not_specialize=["blocks", "count", "total"])
def _refresh_all(
    table, entries, known, found, due, partial, arrived, finished, remembered, base, out, like_A, like_W,
    blocks, count, total,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EPSILON: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out = v of all layers, computed for those that are due.

    Args:
        table, known, found, due: See `_check_all`.
        entries: The layer of each of the `blocks` blocks of rows and columns.
        partial, arrived: See `norm_of_rows`, those of all layers.
        finished: int32 [count] of zeros, which are zeros again afterwards.
        remembered, base, out: fp32 [total], the rows of all layers.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    some = 0
    for start in range(0, count, SIZE):
        places = start + tl.arange(0, SIZE)
        some = some | tl.max(tl.load(due + places, places < count, other=0), 0)
    if some == 0:
        for start in range(program * SIZE, total, programs * SIZE):
            places = start + tl.arange(0, SIZE)
            tl.store(out + places, tl.load(remembered + places, places < total), places < total)
    else:
        for item in range(program, blocks, programs):
            entry = tl.load(entries + item).to(tl.int64)
            row = table + entry * _FIELDS
            local = item - tl.load(row + _REFRESH).to(tl.int32)
            height, offset = tl.load(row + _REFRESH + 1).to(tl.int32), tl.load(row + _REFRESH + 2)
            spans = tl.load(row + _REFRESH + 3).to(tl.int32)
            block, span = local // spans, local % spans
            if tl.load(due + entry) != 0:
                columns = tl.multiple_of(tl.load(row + _REFRESH + 4).to(tl.int32), BLOCK)
                width, rank = tl.load(row + _REFRESH + 5).to(tl.int32), tl.load(row + _REFRESH + 6).to(tl.int32)
                scaling = tl.load(row + _REFRESH + 7).to(tl.int32).to(tl.float32, bitcast=True)
                w_row, w_column = tl.load(row + _REFRESH + 8), tl.load(row + _REFRESH + 9)
                weight = tl.load(row + 3).to(tl.pointer_type(like_W.dtype.element_ty))
                lora_A = tl.load(row + 1).to(tl.pointer_type(like_A.dtype.element_ty))
                if READS != 0:
                    # 16 bytes at a time, as `reads` and `groupable` have seen to
                    weight, width = tl.multiple_of(weight, 16), tl.multiple_of(width, 16)
                    lora_A = tl.multiple_of(lora_A, 16)
                if READS == 1:
                    w_row = tl.multiple_of(w_row, 16)
                if READS == 2:
                    w_column = tl.multiple_of(w_column, 16)
                lora_B = tl.load(row + 2).to(tl.pointer_type(like_A.dtype.element_ty))
                base_due = tl.load(known + entry * 6 + 2) != tl.load(found + entry * 4 + 2)
                value, rows, in_rows, last = norm_of_rows(
                    weight, tl.load(row + 4).to(tl.pointer_type(tl.float32)),
                    tl.load(row + _REFRESH + 11).to(tl.pointer_type(tl.float32)), lora_A, lora_B,
                    partial + tl.load(row + _REFRESH + 12), arrived + tl.load(row + _REFRESH + 13), base + offset,
                    block, span, spans, columns, height, width, rank, scaling, w_row, w_column,
                    tl.load(row + _REFRESH + 10), base_due, READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE,
                    ROWS, BLOCK, STAGES, EPSILON,
                )  # fmt: skip
                if last:
                    tl.store(remembered + offset + rows, value, in_rows)
                    tl.store(out + offset + rows, value, in_rows)
                    row_blocks = tl.cdiv(height, ROWS)
                    # by now no program has yet to compare
                    if tl.atomic_add(finished + entry, 1) == row_blocks - 1:
                        tl.store(finished + entry, 0)
                        conclude(known + entry * 6, found + entry * 4, base_due, 3)
            elif span == 0:
                rows = block * ROWS + tl.arange(0, ROWS)
                value = tl.load(remembered + offset + rows, rows < height, other=1.0)
                tl.store(out + offset + rows, value, rows < height)


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer of a group.

    Attributes:
        memory: What was computed before; the group's own afterwards, see `Group`.
        stored: W0 as `BaseWeight.stored` gives it: a matrix whose rows or columns lie in memory without gaps, or 4-bit.
        lora_A, lora_B: [r, in] and [out, r] as stored, contiguous.
        scaling: s.
    """

    memory: Memory
    stored: Tensor | FourBit
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def groupable(stored: Tensor | FourBit, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the kernels of this file can read these: as they are stored, without a copy."""
    if not (lora_A.is_contiguous() and lora_B.is_contiguous() and lora_A.dtype is lora_B.dtype):
        return False
    # a shard has another shape
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        return False
    if tuple(stored.shape) != (len(lora_B), lora_A.shape[1]) or len(lora_A) != lora_B.shape[1]:
        return False
    held = stored.packed if isinstance(stored, FourBit) else stored
    if lora_A.data_ptr() % 16 or not held.device == lora_A.device == lora_B.device:
        return False
    dense = isinstance(stored, FourBit) or stored.is_contiguous() or stored.T.is_contiguous()
    return dense and min(lora_A.numel(), lora_B.numel()) > 0


def kind(entry: Entry) -> tuple[object, ...]:
    """What two entries of a group have in common: all that a kernel is compiled for."""
    stored, rank = entry.stored, len(entry.lora_A)
    four_bit = isinstance(stored, FourBit)
    chosen = constants(stored, rank)
    return entry.lora_A.device, stored.dtype, four_bit, entry.lora_A.dtype, *chosen.values()


class Group:
    """Layers of one `kind` on one device, whose v are checked and refreshed together.

    The memories of its entries become parts of the group's own, so that a layer that checks by itself in between finds
    what the group has computed, and the group what the layer has.

    Args:
        entries: At least one.

    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        device, heights = entries[0].lora_B.device, [len(entry.lora_B) for entry in entries]
        self.device, self.heights, self.total = device, heights, sum(heights)
        self.known = torch.stack([entry.memory.known for entry in entries])
        self.remembered = torch.cat([entry.memory.remembered for entry in entries])
        self.base = torch.cat([entry.memory.base for entry in entries])
        known, remembered, base = self.known.unbind(), self.remembered.split(heights), self.base.split(heights)
        rows: list[list[int]] = []
        of_check: list[int] = []
        of_refresh: list[int] = []
        offset = partial = arrived = 0
        for number, (entry, height) in enumerate(zip(entries, heights, strict=True)):
            memory, width = entry.memory, entry.lora_A.shape[1]
            memory.move(known[number], remembered[number], base[number])
            spans = division(height, width)[0]
            blocks = cdiv(height, ROWS)
            rows.append(_row(entry, len(of_check), len(of_refresh), offset, partial, arrived))
            factors = (entry.lora_A, entry.lora_B)
            of_check += [number] * (sum(cdiv(factor.numel(), _SIZE) for factor in factors) + 1)
            of_refresh += [number] * (blocks * spans)
            offset, partial, arrived = offset + height, partial + spans * height, arrived + blocks
        self.blocks, self.count = len(of_refresh), len(entries)
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        self.of_check, self.of_refresh = (
            torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device) for numbers in (of_check, of_refresh)
        )
        self.sizes = (partial, arrived)
        self.scratch: dict[int, _Scratch] = {}
        stored = entries[0].stored
        self.four_bit = isinstance(stored, FourBit)
        # what the kernels take dtypes from; no layer's weight is kept alive
        self.like_W = torch.empty(0, dtype=torch.uint8 if self.four_bit else stored.dtype, device=device)
        self.like_A = torch.empty(0, dtype=entries[0].lora_A.dtype, device=device)
        self.like_bits = tuple(map(bits, (self.like_A, self.like_W, self.base)))
        # made for the kernels, perhaps by nobody else
        self.statistics = [(e.stored.absmax, e.stored.code) for e in entries if isinstance(e.stored, FourBit)]
        options = stored_arguments(stored, self.base)[-1]
        self.options = {**options, **constants(stored, len(entries[0].lora_A))}
        self.programs = min(self.blocks, _PROGRAMS * _processors(device))

    def check(self, stream: int, capturing: bool) -> tuple[Tensor, ...]:
        """A new v [out], fp32 and floored, of each entry in their order, computed if its A, B or W0 hold something new.

        Args:
            stream: The one that is launched to. What the kernels count in is kept apart for each.
            capturing: Whether a CUDA graph captures it, which then has counters of its own.
        """
        scratch = None if capturing else self.scratch.get(stream)
        if scratch is None:
            scratch = _Scratch(self.count, *self.sizes, self.device)
            if not capturing:
                self.scratch[stream] = scratch
        _check_all[(len(self.of_check),)](
            self.table, self.of_check, scratch.sums, scratch.checked, self.known, scratch.found, scratch.due,
            *self.like_bits, FOUR_BIT=self.four_bit, SIZE=_SIZE, SAMPLE=SAMPLE, num_warps=4,
        )  # fmt: skip
        out = torch.empty_like(self.remembered)
        _refresh_all[(self.programs,)](
            self.table, self.of_refresh, self.known, scratch.found, scratch.due, scratch.partial, scratch.arrived,
            scratch.finished, self.remembered, self.base, out, self.like_A, self.like_W, self.blocks, self.count,
            self.total, **self.options, EPSILON=torch.finfo(torch.float32).eps, SIZE=1024,
        )  # fmt: skip
        return out.split(self.heights)


def _processors(device: torch.device) -> int:
    """Of a GPU; those of an H100 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class _Scratch:
    """What the kernels count and pass on in, see `_check_all` and `_refresh_all`."""

    def __init__(self, count: int, partial: int, blocks: int, device: torch.device) -> None:
        # each begins at a multiple of 16 bytes, whatever the count: a kernel is compiled for that
        count += count % 2
        sums, zeros = 4 * count, torch.zeros(6 * count + cdiv(blocks, 2), dtype=torch.int64, device=device)
        self.sums = zeros[:sums]
        self.checked = zeros[sums : sums + count].view(torch.int32)
        self.finished = zeros[sums + count : sums + 2 * count].view(torch.int32)
        self.arrived = zeros[sums + 2 * count :].view(torch.int32)
        self.found = torch.empty(sums, dtype=torch.int64, device=device)
        self.due = torch.empty(count, dtype=torch.int32, device=device)
        self.partial = torch.empty(partial, dtype=torch.float32, device=device)


def _row(entry: Entry, check: int, refresh: int, offset: int, partial: int, arrived: int) -> list[int]:
    """A row of the table.

    Args:
        entry: The layer.
        check, refresh: Its first program of the check and its first block of the refresh.
        offset, partial, arrived: Where its parts of the group's memory begin.
    """
    stored, height, width = entry.stored, len(entry.lora_B), entry.lora_A.shape[1]
    bits_W = bits(stored.packed if isinstance(stored, FourBit) else stored)
    weight, absmax, code, (w_row, w_column, blocksize), _ = stored_arguments(stored, bits_W)
    # as in `checked_norm`
    statistics, stride = absmax.numel(), max(1, absmax.numel() // SAMPLE)
    # the bits of an fp32
    (scaling,) = struct.unpack("<i", struct.pack("<f", entry.scaling))
    row = [
        check, entry.lora_A.data_ptr(), entry.lora_B.data_ptr(), weight.data_ptr(), absmax.data_ptr(),
        entry.lora_A.numel(), entry.lora_B.numel(), *sample_of(bits_W), min(SAMPLE, statistics), stride,
        refresh, height, offset, *division(height, width), width, len(entry.lora_A), scaling, w_row, w_column,
        blocksize, code.data_ptr(), partial, arrived,
    ]  # fmt: skip
    return row + [0] * (_FIELDS.value - len(row))
