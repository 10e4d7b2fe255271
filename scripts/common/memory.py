"""What the benchmarks share: measures of memory, the description of the machine, and files written whole or not at all.

Imported by `scripts/benchmark.py` and `scripts/benchmark_memory.py`; not a program of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode  # documented in "Extending PyTorch", whatever its path

import dora_peft

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
        # A weak reference keeps the storage's header, so no key is used twice; 0 bytes where it existed before.
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
        gc.collect()  # a cycle that waits for the collector is not kept for backward
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
    gc.freeze()  # the collection in `alive_bytes` looks at nothing older than this
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


def enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    """Turn on activation checkpointing, which transformers renamed in the course of version 5."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions of the packages, git commit if there is one and whether the code differs from it."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"dora_peft": dora_peft.__version__},
        # the variable names the commit where the files travelled without their repository
        "commit": run_git("rev-parse", "HEAD") or os.environ.get("DORA_PEFT_COMMIT"),
        "modified": bool(run_git("status", "--porcelain", "--", "../dora_peft", "*.py")),
    }


def run_git(*arguments: str) -> str | None:
    """The output of a git command in scripts/, None where there is no git, no repository, or nothing to say."""
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def processor_name() -> str:
    """The processor's model, such as "AMD EPYC"; its architecture where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, beside `path` and with its suffix, that takes its place once all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, which never holds half of it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
