"""Kernels that copy some elements of a layer's output, and find out later whether it still holds the same bits.

Which elements is for the caller to say, see ops/kept_output.py: some that follow one another, and some that are evenly
spaced. Nothing here synchronises with the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel
from .tuning import cdiv

# Bytes before the rows of a sample that is kept in one piece: what kernels are compiled for if memory begins there.
_HEAD = 16
# The elements that follow one another, the others, and a number.
Parts = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _bits(value):
    """`value` as whole numbers: NaN is equal to itself there."""
    # Triton 3.2 cannot compare the number of bits
    return value.to(tl.int32 if value.dtype == tl.float32 else tl.int16, bitcast=True)


@Kernel
@triton.jit(do_not_specialize=["offset", "start", "step", "size", "count"])
def _take_sample(
    y, rows, diagonal, gone, offset, start, step, size, count, CLEARS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Copies `size` elements from `offset` on, and `count` elements from `start` on, `step` apart; sets gone[0] to 0 if
    it CLEARS."""
    # the outer one is decided by the compiler
    if CLEARS:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(gone, 0)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rows + lanes, tl.load(y + offset + lanes, lanes < size), lanes < size)
    places = start + lanes.to(tl.int64) * step
    tl.store(diagonal + lanes, tl.load(y + places, lanes < count), lanes < count)


@Kernel
@triton.jit(do_not_specialize=["offset", "start", "step", "size", "count"])
def _compare_sample(y, rows, diagonal, gone, offset, start, step, size, count, BLOCK: tl.constexpr):
    """Sets gone[0] to 1 if y holds other bits there."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < size
    differs = _bits(tl.load(y + offset + lanes, inside, other=0)) != _bits(tl.load(rows + lanes, inside, other=0))
    inside = lanes < count
    places = start + lanes.to(tl.int64) * step
    found = _bits(tl.load(y + places, inside, other=0))
    differs = differs | (found != _bits(tl.load(diagonal + lanes, inside, other=0)))
    tl.atomic_max(gone, tl.max(differs.to(tl.int32), 0))


def take_sample(
    y: Tensor, offset: int, start: int, step: int, size: int, count: int, *, into: Parts | None = None
) -> tuple[Tensor, Tensor]:
    """Copy elements of an output.

    Args:
        y: [..., out], contiguous, of 2 or 4 bytes an element.
        offset, size: The first of the elements that follow one another, and how many they are.
        start, step, count: The first of the others, how far apart they are, and how many.
        into: Memory for the copies, and for a number that is set to 0.

    Returns:
        The copies, [size] and [count].
    """
    rows, diagonal, gone = into or (y.new_empty(size), y.new_empty(count), None)
    if y.numel():
        _take_sample[(cdiv(max(size, count), 1024),)](
            y, rows, diagonal, rows if gone is None else gone, offset, start, step, size, count,
            CLEARS=gone is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return rows, diagonal


def compare_sample(
    y: Tensor, rows: Tensor, diagonal: Tensor, offset: int, start: int, step: int, *, gone: Tensor | None = None
) -> Tensor:
    """Find out whether an output holds other bits than `take_sample` copied from the same places.

    Args:
        y: [..., out], contiguous.
        rows, diagonal: What `take_sample` gave, in any shape.
        offset, start, step: As there.
        gone: The number that `take_sample` has set to 0, written.

    Returns:
        A number [1], int32, on y's device, that is not 0 if it does.
    """
    gone = torch.zeros(1, dtype=torch.int32, device=y.device) if gone is None else gone
    if y.numel():
        size, count = rows.numel(), diagonal.numel()
        _compare_sample[(cdiv(max(size, count), 1024),)](
            y, rows, diagonal, gone, offset, start, step, size, count, BLOCK=1024, num_warps=4
        )
    return gone


def sample_size(size: int, count: int, dtype: torch.dtype) -> int:
    """How many elements `keep_sample` takes for `size` and `count` of an output in `dtype`."""
    head = _HEAD // dtype.itemsize
    return head + cdiv(size, head) * head + count


def keep_sample(y: Tensor, sample: Tensor, offset: int, start: int, step: int, size: int, count: int) -> None:
    """`take_sample` into one piece of memory, in which `find_change` has a place to write to: one allocation, and no
    fill of its own.

    Args:
        sample: [sample_size(size, count)], in y's dtype; written.
    """
    take_sample(y, offset, start, step, size, count, into=_parts(sample, size))


def find_change(y: Tensor, sample: Tensor, offset: int, start: int, step: int, size: int) -> None:
    """`compare_sample` with what `keep_sample` copied from the same places: sets `changed` of `sample` if y holds other
    bits."""
    rows, diagonal, gone = _parts(sample, size)
    compare_sample(y, rows, diagonal, offset, start, step, gone=gone)


def changed(sample: Tensor) -> Tensor:
    """A number [1], int32, that is not 0 once `find_change` found a change."""
    return sample[: 4 // sample.itemsize].view(torch.int32)


def _parts(sample: Tensor, size: int) -> Parts:
    """The rows, the diagonal and the number, each at a multiple of 16 bytes."""
    head = _HEAD // sample.itemsize
    return sample[head : head + size], sample[head + cdiv(size, head) * head :], changed(sample)
