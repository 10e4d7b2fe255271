"""Memory for blocks of W0 that are read and let go: one buffer for all layers of an operation.

    with scratch.kept():                                          # creating, loading or merging adapters of a model
        ...
        with scratch.lent(elements, dtype, device) as buffer:     # one layer's blocks

Without `kept` every loan is an allocation of its own, freed with its end. With one per layer, blocks of megabytes would
come and go between the small tensors that each layer keeps; these settle in the holes, the next block does not fit
there any more, and the heap grows by one block a layer: 923 MiB for an adapter of 44 MiB on a model of 1.2B.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# What one buffer holds from the start, so that it need not grow: a block of W0 (BLOCK_BYTES in base.py).
CAPACITY = 12 * 2**20
# Of the start of each loan, as torch aligns its own memory.
_ALIGNMENT = 64


class _Buffer:
    """Bytes on one device, lent from the bottom up, the last loan back first.

    Attributes:
        memory: uint8 [bytes].
        ends: The first byte after each loan that is out. Whoever forgets to give one back (a generator in the traceback
            of an error) keeps those above it from being lent again, and nothing else.
    """

    __slots__ = ("ends", "memory")

    def __init__(self, size: int, device: torch.device) -> None:
        # what is made in inference mode cannot be written to outside of it
        with torch.inference_mode(False):
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.ends: list[int] = []

    @property
    def used(self) -> int:
        return self.ends[-1] if self.ends else 0


class _Kept:
    """The buffers of one operation, by device, and the thread that it runs in."""

    __slots__ = ("buffers", "thread")

    def __init__(self) -> None:
        self.buffers: dict[torch.device, _Buffer] = {}
        self.thread = threading.get_ident()

    def buffer(self, size: int, device: torch.device) -> _Buffer | None:
        """One with so many free bytes, None if what there is has been lent."""
        found = self.buffers.get(device)
        if found is not None and found.used + size <= found.memory.numel():
            return found
        if found is not None and found.used:
            return None
        # let go of the smaller one before there is a larger one
        self.buffers.pop(device, None)
        del found
        new = self.buffers[device] = _Buffer(max(size, CAPACITY), device)
        return new


_open: ContextVar[_Kept | None] = ContextVar("scratch", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Have all loans of the body, in this thread, share one buffer per device, which is freed at its end.

    Inside of another one nothing happens: the outer one's buffers serve.
    """
    if is_kept():
        yield
        return
    token = _open.set(_Kept())
    try:
        yield
    finally:
        _open.reset(token)


def is_kept() -> bool:
    """Whether an operation is under way in this thread whose layers share a buffer."""
    held = _open.get()
    return held is not None and held.thread == threading.get_ident()


@contextmanager
def lent(elements: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A tensor [elements] that holds anything, and is another's as soon as the body has ended.

    Args:
        elements: How many.
        dtype: Their dtype.
        device: Where.
    """
    held = _open.get()
    size = -(-elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    # a thread that was started with a copy of the context has to have its own
    own = held is not None and held.thread == threading.get_ident() and device.type != "meta"
    buffer = held.buffer(size, device) if held is not None and own else None
    if buffer is None:
        yield torch.empty(elements, dtype=dtype, device=device)
        return
    start = buffer.used
    buffer.ends.append(start + size)
    try:
        yield buffer.memory[start : start + elements * dtype.itemsize].view(dtype)
    finally:
        buffer.ends.remove(start + size)


def like(tensor: Tensor, memory: Tensor) -> Tensor:
    """A tensor of the shape of `tensor`, in the order of its strides and the dtype of `memory`, at the start of that.

    As `tensor.to(memory.dtype)` lays out its result: sums over a transposed matrix have to be rounded as before.
    """
    strides = torch.empty_like(tensor, device="meta").stride()
    return memory.as_strided(tensor.shape, strides)
