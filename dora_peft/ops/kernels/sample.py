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


@triton.jit
def _bits(value):
    """`value` as whole numbers: NaN is equal to itself there."""
    # Triton 3.2 cannot compare the number of bits
    return value.to(tl.int32 if value.dtype == tl.float32 else tl.int16, bitcast=True)


@Kernel
@triton.jit(do_not_specialize=["offset", "start", "step", "size", "count"])
def _take_sample(y, rows, diagonal, offset, start, step, size, count, BLOCK: tl.constexpr):
    """Copies `size` elements from `offset` on, and `count` elements from `start` on, `step` apart."""
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
            y, rows, diagonal, offset, start, step, size, count, BLOCK=1024, num_warps=4
        )
    return rows, diagonal


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
