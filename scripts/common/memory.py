"""Measures of memory: what is kept for backward, and the peak."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# documented in "Extending PyTorch", whatever its path
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


@contextlib.contextmanager
def record_saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect what autograd saves for backward: address and size in bytes of each distinct storage.

    Parameters and buffers are left out; they exist anyway. What a custom autograd function keeps as an attribute of its
    context passes no hook and is not seen here; `saved_bytes` counts it.
    """
    kept = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
        # The graph holds the tensor until backward, so no address is used twice while we count.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


class NewStorages(TorchDispatchMode):
    """Notes every storage that an operator creates while this mode is on, and keeps none of them alive."""

    def __init__(self) -> None:
        super().__init__()
        # A weak reference keeps the storage's header, so no key is used twice; 0 bytes if it existed before.
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self.note(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.note(tensor, tensor.untyped_storage().nbytes())
        return result

    def note(self, tensor: Tensor, size: int) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.seen.setdefault(reference.cdata, (reference, size))

    def alive_bytes(self) -> int:
        """Bytes of the noted storages that still exist."""
        # a cycle that waits for the collector is not kept for backward
        gc.collect()
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes kept from forward to backward: storages made by `forward` that outlive it while only its loss is held.

    Whatever keeps them counts: saved tensors, attributes of a function's context, closures of checkpointing.
    Parameters, buffers and inputs existed before and do not. No saved-tensor hook is active. Call `forward` once
    before, so that nothing that it caches for good is counted. Runs the backward pass to free what was kept.
    """
    # the collection in `alive_bytes` looks at nothing older than this
    gc.freeze()
    try:
        with NewStorages() as storages:
            loss = forward()
        alive = storages.alive_bytes() - loss.untyped_storage().nbytes()
    finally:
        gc.unfreeze()
    loss.backward()
    return alive


class PeakMemory:
    """Peak memory from `start` to `stop`: the allocator's on a GPU, on the CPU the resident set's growth."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base_bytes = psutil.Process().memory_info().rss
        self.peak_bytes = 0
        self.stopped = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        process = psutil.Process()
        while not self.stopped.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss - self.base_bytes)

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.watcher.start()

    def stop(self) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.stopped.set()
            self.watcher.join()
