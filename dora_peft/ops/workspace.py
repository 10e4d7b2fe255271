"""Memory of a thread for what one operation makes and lets go of on a CPU, kept from call to call.

A new allocation of megabytes pays a page fault for every 4 KiB, which costs more than the arithmetic that writes it;
what is kept also stays in the cache. Whoever asks gets the same memory as last time: the content is only valid until
the next call for the same purpose in this thread, and must never be handed out.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from . import torch_names

# The most that is kept for one purpose; more is allocated each time, and freed.
MOST_BYTES = 16 * 2**20
# Shapes whose views are remembered.
_VIEWS = 64


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}


_kept = _Kept()


def workspace(purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory of this shape, in the dtype and on the device of `like`.

    Args:
        purpose: What it is for: equal memory for equal purposes.
    """
    if not like.is_cpu or type(like) is not Tensor or torch_names.modes():
        return like.new_empty(shape)
    key = purpose, shape, like.dtype
    view = _kept.views.get(key)
    return _viewed(key) if view is None else view


def _viewed(key: tuple[str, tuple[int, ...], torch.dtype]) -> Tensor:
    purpose, shape, dtype = key
    count = 1
    for size in shape:
        count *= size
    count *= dtype.itemsize
    # tensors made in inference mode cannot be written to outside of it
    with torch.inference_mode(False), torch.no_grad():
        if count > MOST_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        memory = _kept.memory.get(purpose)
        if memory is None or memory.numel() < count:
            memory = _kept.memory[purpose] = torch.empty(count, dtype=torch.uint8, device="cpu")
            _kept.views = {key: view for key, view in _kept.views.items() if key[0] != purpose}
        if len(_kept.views) >= _VIEWS:
            _kept.views.clear()
        view = _kept.views[key] = memory[:count].view(dtype).view(shape)
    return view
