"""Triton kernels that check and refresh v = ||W0 + s B A||, reading a dense or 4-bit W0 once and writing [out] numbers.

`checked_norm` decides on the device whether v is due, so that nothing waits for the host and a captured CUDA graph
decides again in each replay: one kernel sums a mixture of every bit of A and B and of a sample of W0 with its place,
the other computes v if the sums differ from those of the last time, and hands out the v that it remembers if not.
grouped_norm.py does the same for all layers of a model at once. See norms/ for when this is used. Importing this module
imports Triton.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from .elements import stored_arguments
from .launch import Kernel
from .norm_rows import ROWS, SAMPLE, bits, conclude, constants, division, mixed_sum, norm_of_rows, sample_of
from .prepared import Prepared
from .tuning import cdiv


@Kernel
@triton.jit(do_not_specialize=["count_A", "count_B", "count_W", "start", "step"])
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


@Kernel
@triton.jit(do_not_specialize=["spans", "height", "rank"])
def _norm(
    weight, absmax, code, lora_A, lora_B, partial, arrived, out, spans, columns, height, width, rank, scaling, w_row,
    w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    value, rows, in_rows, last = norm_of_rows(
        weight, absmax, code, lora_A, lora_B, partial, arrived, out, tl.program_id(0) // spans,
        tl.program_id(0) % spans, spans, columns, height, width, rank, scaling, w_row, w_column, blocksize, False,
        READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK, STAGES, 0.0,
    )  # fmt: skip
    if last:
        tl.store(out + rows, value, in_rows)


@Kernel
@triton.jit(do_not_specialize=["due", "compared", "spans", "height", "rank"])
def _checked_norm(
    weight, absmax, code, lora_A, lora_B, partial, arrived, sums, known, remembered, base, out, due, compared, spans,
    columns, height, width, rank, scaling, w_row, w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EPSILON: tl.constexpr,
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
            PRECISION, RANKS, WHOLE, ROWS, BLOCK, STAGES, EPSILON,
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
    blocks = cdiv(height, ROWS)
    arrived = torch.zeros(blocks, dtype=torch.int32, device=out.device)
    partial = torch.empty(spans * height if spans > 1 else 1, dtype=torch.float32, device=out.device)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    _norm[(blocks * spans,)](
        weight, absmax, code, lora_A, lora_B, partial, arrived, out, spans, columns, height, width, rank, scaling,
        *layout, **options, **constants(stored, rank),
    )  # fmt: skip
    return out


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Memory:
    """What a device remembers of one v between forward passes. Written by the check alone, and saved by no graph.

    Attributes:
        known: The sums of A, B, W0's sample and all of W0 that `remembered` belongs to, and how often it was computed:
            int64 [6], of which the last is not used: a multiple of 16 bytes, however many lie behind one another.
        remembered: v [out], fp32.
        base: ||W0||^2 [out], fp32.
    """

    def __init__(self, height: int, device: torch.device) -> None:
        self.known = torch.zeros(6, dtype=torch.int64, device=device)
        self.remembered = torch.empty(height, dtype=torch.float32, device=device)
        self.base = torch.empty(height, dtype=torch.float32, device=device)
        # a CUDA graph goes on writing where it was captured
        self._captured: list[tuple[Tensor, Tensor, Tensor]] = []

    def move(self, known: Tensor, remembered: Tensor, base: Tensor) -> None:
        """Be these tensors from now on, which hold the same."""
        if self._captured:
            self._captured.append((self.known, self.remembered, self.base))
        self.known, self.remembered, self.base = known, remembered, base

    def note_capture(self) -> None:
        """Keep the present tensors alive if a CUDA graph is being captured."""
        if not self._captured and capturing(self.known.device):
            self._captured.append((self.known, self.remembered, self.base))


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
    memory.note_capture()
    if not (due or another or isinstance(stored, FourBit)):
        return _Repeated.of(stored, lora_A, lora_B)(memory, stored, lora_A, lora_B, scaling)
    return _checked(memory, stored, lora_A, lora_B, scaling, due, another)


def _checked(
    memory: Memory,
    stored: Tensor | FourBit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    due: bool,
    another: bool,
) -> Tensor:
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    height, width = len(lora_B), lora_A.shape[1]
    spans, blocks = division(height, width)[0], cdiv(height, ROWS)
    zeros = torch.zeros(_count_zeros(blocks), dtype=torch.int64, device=lora_A.device)
    sums = _split_zeros(zeros)[0]
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
    _refresh(
        memory.known, memory.remembered, memory.base, stored, lora_A, lora_B, scaling, zeros, partial, out, due, another
    )
    return out


def _refresh(
    known: Tensor, remembered: Tensor, base: Tensor, stored: Tensor | FourBit, lora_A: Tensor, lora_B: Tensor,
    scaling: float, zeros: Tensor, partial: Tensor, out: Tensor, due: bool = False, another: bool = False,
) -> None:  # fmt: skip
    """Launch the kernel that computes v if it is due."""
    (height, rank), width = lora_B.shape, lora_A.shape[1]
    spans, columns = division(height, width)
    sums, arrived = _split_zeros(zeros)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    _checked_norm[(cdiv(height, ROWS) * spans,)](
        weight, absmax, code, lora_A, lora_B, partial, arrived, sums, known, remembered, base, out, int(due),
        4 if another else 3, spans, columns, height, width, rank, scaling, *layout, **options,
        **constants(stored, rank), EPSILON=torch.finfo(torch.float32).eps,
    )  # fmt: skip


def _count_zeros(blocks: int) -> int:
    """Of int64: the sums, and as int32 who has arrived."""
    return 4 + cdiv(blocks + 1, 2)


def _split_zeros(zeros: Tensor) -> tuple[Tensor, Tensor]:
    return zeros[:4], zeros[4:].view(torch.int32)


class _Repeated:
    """`checked_norm` of one layout, a dense W0 that is neither due nor another: what a layer that is called by itself
    asks for in every pass. What follows from shapes, strides and dtypes is worked out once."""

    known: ClassVar[dict[tuple[object, ...], _Repeated]] = {}

    @classmethod
    def of(cls, stored: Tensor, lora_A: Tensor, lora_B: Tensor) -> _Repeated:
        key = (
            stored.get_device(), stored.dtype, stored.shape, stored.stride(), lora_A.get_device(), lora_A.dtype,
            lora_A.shape, lora_A.stride(), lora_B.get_device(), lora_B.dtype, lora_B.shape, lora_B.stride(),
        )  # fmt: skip
        found = cls.known.get(key)
        if found is None:
            if len(cls.known) >= 1024:
                cls.known.clear()
            found = cls.known[key] = cls(stored, lora_A, lora_B)
        return found

    def __init__(self, stored: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        height = len(lora_B)
        spans = division(height, lora_A.shape[1])[0]
        self.count, self.parts = _count_zeros(cdiv(height, ROWS)), spans * height if spans > 1 else 1
        # a copy would be another one each time
        self.usual = lora_A.is_contiguous() and lora_B.is_contiguous() and stored.get_device() == lora_A.get_device()

        def digest(stored: Tensor, lora_A: Tensor, lora_B: Tensor, zeros: Tensor) -> None:
            bits_W = bits(stored)
            _sum(bits(lora_A), bits(lora_B), bits_W, _split_zeros(zeros)[0], *sample_of(bits_W))

        self._digest, self._refresh = Prepared(digest), Prepared(_refresh, {6: "scaling"})

    def __call__(self, memory: Memory, stored: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        if not self.usual:
            return _checked(memory, stored, lora_A, lora_B, scaling, False, False)
        zeros = torch.zeros(self.count, dtype=torch.int64, device=lora_A.device)
        self._digest.call(stored, lora_A, lora_B, zeros)
        out = torch.empty_like(memory.remembered)
        partial = torch.empty(self.parts, dtype=torch.float32, device=out.device)
        self._refresh.call(
            memory.known, memory.remembered, memory.base, stored, lora_A, lora_B, float(scaling), zeros, partial, out
        )  # fmt: skip
        return out


def _sum(bits_A: Tensor, bits_B: Tensor, bits_W: Tensor, sums: Tensor, count: int, start: int, step: int) -> None:
    size = 1024
    blocks = cdiv(bits_A.numel(), size) + cdiv(bits_B.numel(), size) + cdiv(count, size)
    _digest[(blocks,)](
        bits_A, bits_B, bits_W, sums, bits_A.numel(), bits_B.numel(), count, start, step, SIZE=size, num_warps=4
    )
