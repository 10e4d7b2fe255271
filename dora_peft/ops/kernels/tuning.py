"""How kernels are configured: which sizes of blocks are tried, and what a configuration depends on."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from ..constants import interpreted
from .launch import Argument, Constant, Grid, Kernel

INTERPRETED = interpreted()


def tuned(
    keys: list[str], configs: list[dict[str, int]], scratch: list[str] | None = None
) -> Callable[[JITFunction], Kernel]:
    """A kernel that takes the fastest of some configurations; the first, untimed, in the interpreter.

    Args:
        keys: The kernel's arguments whose values choose a configuration.
        configs: Constants of the kernel in capitals, and `num_warps` and `num_stages`.
        scratch: Arguments that the kernel may write over what it reads: trials write elsewhere.
    """
    choices = [
        triton.Config(
            {name: value for name, value in config.items() if name.isupper()},
            num_warps=config.get("num_warps", 4),
            num_stages=config.get("num_stages", 3),
        )
        for config in (configs[:1] if INTERPRETED else configs)
    ]
    return lambda fn: Kernel(fn, Tuner(choices, keys, scratch or []))


class Tuner:
    """Finds one kernel's fastest configuration, and remembers it here and in Triton's cache on disk.

    Attributes:
        configs, keys, scratch: See `tuned`.
        chosen: What was found, by device and by what it depends on.
    """

    def __init__(self, configs: list[triton.Config], keys: list[str], scratch: list[str]) -> None:
        self.configs, self.keys, self.scratch = configs, keys, scratch
        self.chosen: dict[tuple[object, ...], triton.Config] = {}

    def choose(
        self, kernel: Kernel, index: int, grid: Grid, args: tuple[Argument, ...], constants: dict[str, Constant]
    ) -> tuple[triton.Config, bool]:
        """The configuration for a launch on the current device, and whether it may be remembered.

        While a CUDA graph is captured nothing can be timed: what is unknown then takes the first configuration, and is
        tuned when it is launched outside of a capture.
        """
        if len(self.configs) == 1:
            return self.configs[0], True
        key = self._key(kernel, index, args, constants)
        if key not in self.chosen:
            found = self._read(kernel, key)
            if found is None and torch.cuda.is_current_stream_capturing():
                return self.configs[0], False
            if found is None:
                found = self._fastest(kernel, grid, args, constants)
                self._write(kernel, key, found)
            self.chosen[key] = found
        return self.chosen[key], True

    def _key(
        self, kernel: Kernel, index: int, args: tuple[Argument, ...], constants: dict[str, Constant]
    ) -> tuple[object, ...]:
        named = dict(zip(kernel.arg_names, args, strict=False))
        dtypes = [str(value.dtype) for value in args if isinstance(value, Tensor)]
        return gpu(index), *(named[name] for name in self.keys), *dtypes, *sorted(constants.items())

    def _fastest(
        self, kernel: Kernel, grid: Grid, args: tuple[Argument, ...], constants: dict[str, Constant]
    ) -> triton.Config:
        values = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            if name in self.scratch and isinstance(value, Tensor)
            else value
            for name, value in zip(kernel.arg_names, args, strict=False)
        ]
        times: list[tuple[float, int]] = []
        failures: list[Exception] = []
        for number, config in enumerate(self.configs):
            options = {**constants, **config.all_kwargs()}
            try:
                times.append((median_ms(lambda: kernel.by_triton(grid, tuple(values), options)), number))  # noqa: B023
            except (OutOfResources, CompileTimeAssertionFailure) as error:
                # a configuration that this GPU cannot run
                failures.append(error)
        if not times:
            raise failures[0]
        return self.configs[min(times)[1]]

    def _read(self, kernel: Kernel, key: tuple[object, ...]) -> triton.Config | None:
        path = self._cache(kernel, key).get_file(f"{kernel.__name__}.json")
        if path is None:
            return None
        with open(path) as file:
            return self.configs[json.load(file)["config"]]

    def _write(self, kernel: Kernel, key: tuple[object, ...], config: triton.Config) -> None:
        text = json.dumps({"config": self.configs.index(config), "key": [str(part) for part in key]})
        self._cache(kernel, key).put(text, f"{kernel.__name__}.json", binary=False)

    def _cache(self, kernel: Kernel, key: tuple[object, ...]):
        """Triton's own folder for this kernel's source, these configurations and this key."""
        parts = [triton.__version__, kernel.fn.cache_key, *map(str, self.configs), *map(str, key)]
        return get_cache_manager(hashlib.sha256("\n".join(parts).encode()).hexdigest())


def gpu(index: int) -> str:
    """The model of a GPU: those of one model share a configuration."""
    return torch.cuda.get_device_name(index)


def median_ms(run: Callable[[], object]) -> float:
    """Milliseconds that a launch takes on the current device, of a few after the first, which may compile."""
    run()
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for event in events:
        event.record()
        run()
    torch.cuda.current_stream().synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in zip(events, events[1:], strict=False))


def token_bucket(length: int) -> int:
    """Token counts that share a configuration: up to the next power of two."""
    return power_of_two(max(length, 16))


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` multiplies in: tf32 for fp32 if torch's products may use it, else as precisely as it can."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def ranks_at_once(rank: int) -> int:
    """How many ranks a product takes at once; 16 is the least that the matrix units take."""
    return min(64, max(16, power_of_two(rank)))


def power_of_two(number: int) -> int:
    """The next power of two. Triton's own functions for it and for `cdiv` take microseconds."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, by: int) -> int:
    """`number` / `by`, rounded up."""
    return -(-number // by)
