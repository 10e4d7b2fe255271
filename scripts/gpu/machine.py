"""What a GPU machine has; all but `describe_gpu` is found without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "pytest")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """The installed version of each package, None if it is missing."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def ask(*command: str) -> str | None:
    """What a program prints, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout.strip() if result.returncode == 0 else None


def gpu_names() -> list[str]:
    """Name, driver and memory of each GPU as nvidia-smi gives them, empty if it is not there."""
    found = ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return [] if found is None else found.splitlines()


def describe_gpu(device: str) -> dict[str, Any]:
    """Driver, memory, capability, the C compiler that Triton calls, and the processor's cores."""
    import torch

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    banner = None if compiler is None else ask(compiler, "--version")
    found: dict[str, Any] = {"gpus": gpu_names(), "cuda_of_torch": torch.version.cuda, "cores": os.cpu_count()}
    found["compiler"] = banner.splitlines()[0] if banner else None
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return found
