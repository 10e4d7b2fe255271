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
    if CLEARS:
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


def take_sample(y: Tensor, offset: int, start: int, step: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Copy elements of an output.

    Args:
        y: [..., out], contiguous, of 2 or 4 bytes an element.
        offset, size: The first of the elements that follow one another, and how many they are.
        start, step, count: The first of the others, how far apart they are, and how many.

    Returns:
        The copies, [size] and [count].
    """
    rows, diagonal = y.new_empty(size), y.new_empty(count)
    if y.numel():
        _take_sample[(cdiv(max(size, count), 1024),)](
            y, rows, diagonal, rows, offset, start, step, size, count, CLEARS=False, BLOCK=1024, num_warps=4
        )
    return rows, diagonal


def sample_size(size: int, count: int, dtype: torch.dtype) -> int:
    """How many elements `keep_sample` takes for `size` and `count` of an output in `dtype`."""
    head = _HEAD // dtype.itemsize
    return head + cdiv(size, head) * head + count


def keep_sample(y: Tensor, sample: Tensor, offset: int, start: int, step: int, size: int, count: int) -> None:
    """`take_sample` into one piece of memory, in which `find_change` has a place to write to: one allocation, and no
    fill of its own.

    Args:
        sample: [sample_size(size, count)], in y's dtype; written. It begins with a number, see `find_change`.
    """
    rows, diagonal, gone = _parts(sample, size)
    _take_sample[(cdiv(max(size, count, 1), 1024),)](
        y, rows, diagonal, gone, offset, start, step, size, count, CLEARS=True, BLOCK=1024, num_warps=4
    )


def find_change(y: Tensor, sample: Tensor, offset: int, start: int, step: int, size: int, count: int) -> None:
    """`compare_sample` with what `keep_sample` copied: sets the number at the beginning of `sample`, see `changed`, if
    y holds other bits."""
    rows, diagonal, gone = _parts(sample, size)
    _compare_sample[(cdiv(max(size, count, 1), 1024),)](
        y, rows, diagonal, gone, offset, start, step, size, count, BLOCK=1024, num_warps=4
    )


def changed(sample: Tensor) -> Tensor:
    """A number [1], int32, that is not 0 once `find_change` found a change."""
    return sample[: 4 // sample.itemsize].view(torch.int32)


def _parts(sample: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, the diagonal and the number, each at a multiple of 16 bytes."""
    head = _HEAD // sample.itemsize
    return sample[head : head + size], sample[head + cdiv(size, head) * head :], changed(sample)


def compare_sample(y: Tensor, rows: Tensor, diagonal: Tensor, offset: int, start: int, step: int) -> Tensor:
    """Find out whether an output holds other bits than `take_sample` copied from the same places.

    Args:
        y: [..., out], contiguous.
        rows, diagonal: What `take_sample` gave, in any shape.
        offset, start, step: As there.

    Returns:
        A number [1], int32, on y's device, that is not 0 if it does.
    """
    gone = torch.zeros(1, dtype=torch.int32, device=y.device)
    if y.numel():
        size, count = rows.numel(), diagonal.numel()
        _compare_sample[(cdiv(max(size, count), 1024),)](
            y, rows, diagonal, gone, offset, start, step, size, count, BLOCK=1024, num_warps=4
        )
    return gone
