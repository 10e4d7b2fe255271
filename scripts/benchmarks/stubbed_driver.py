"""Triton on a machine without a GPU, for what it costs on the host: nothing is compiled, and launching does nothing.

Tensors lie on the CPU and stand for tensors on the first GPU. What the package does besides launching is as on a GPU;
of Triton, all but the compiler and the call of the driver's launch function runs as it does there.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

# before Triton is imported
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="stubbed_triton_")

import torch
import triton
from triton.backends.compiler import GPUTarget

from dora_peft.ops import choice, overwritten


class Launch:
    """Stands for the function that gives a kernel to the driver."""

    def __init__(self, src: object = None, metadata: object = None) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


class Driver:
    """Stands for Triton's driver of one H100."""

    launcher_cls = Launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Runs each configuration once: Triton's own tuner takes the first."""

        def once(run: Any, quantiles: object) -> list[float]:
            run()
            return [1.0, 1.0, 1.0]

        return once


class Compiled:
    """Stands for machine code."""

    packed_metadata = (4, 1, 0)
    function = 1

    def __init__(self) -> None:
        self.run = Launch()

    def launch_metadata(self, *_: object) -> None:
        return None


# A name for each time that a kernel was compiled, and for each trial of a configuration.
compiled: list[str] = []
trials: list[str] = []


def install() -> None:
    """Replace the driver and the compiler for the rest of the process, and choose the kernels for every tensor."""

    def compile_nothing(src: Any, **_: object) -> Compiled:
        compiled.append(src.fn.__name__)
        return Compiled()

    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]
    triton.compiler.compile = compile_nothing  # type: ignore[assignment]
    # `implementation("triton")` would look for a GPU
    choice.selected = "triton"
    try:
        from dora_peft.norms import grouped
        from dora_peft.ops.kernels import launch, tuning
    except ImportError:
        # the package before it had a launch helper of its own, or checked layers together
        return
    # no kernel has cleared it: memory holds what it held
    overwritten._Later.value = lambda _: 0  # type: ignore[method-assign]
    # kernels run here
    grouped.interpreted = lambda: True
    launch.device_of = lambda _: 0  # type: ignore[assignment]
    launch.current_device = lambda: 0
    launch.current_stream = lambda _: 0

    def timed(run: Any) -> float:
        run()
        trials.append("")
        return 1.0

    tuning.capturing = lambda: False
    tuning.gpu = lambda _: "none"
    # of an H100
    tuning.shared_memory_kib = lambda: 227
    tuning.median_ms = timed
