"""How kernels are configured: which sizes of blocks are tried, and what a configuration depends on."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from ..constants import interpreted

INTERPRETED = interpreted()


def tuned(
    keys: list[str], configs: list[dict[str, int]], restored: list[str] | None = None
) -> Callable[[JITFunction], Autotuner]:
    """`triton.autotune` with results kept on disk; the first configuration, untimed, in the interpreter.

    Args:
        keys: The kernel's arguments whose values choose a configuration.
        configs: Constants of the kernel in capitals, and `num_warps` and `num_stages`.
        restored: Arguments that the kernel writes over what it reads: they are put back between trials.
    """

    def decorate(kernel: JITFunction) -> Autotuner:
        choices = [
            triton.Config(
                {name: value for name, value in config.items() if name.isupper()},
                num_warps=config.get("num_warps", 4),
                num_stages=config.get("num_stages", 3),
            )
            for config in (configs[:1] if INTERPRETED else configs)
        ]
        kept = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
        return triton.autotune(choices, key=keys, restore_value=restored, **kept)(kernel)

    return decorate


def token_bucket(length: int) -> int:
    """Token counts that share a configuration: up to the next power of two."""
    return triton.next_power_of_2(max(length, 16))


def ranks_at_once(rank: int) -> int:
    """How many ranks a product takes at once; 16 is the least that the matrix units take."""
    return min(64, max(16, triton.next_power_of_2(rank)))
