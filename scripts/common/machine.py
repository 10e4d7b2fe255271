"""What a stored result says of the machine and the versions that it was measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dora_peft


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions of the packages, git commit if there is one and whether the code differs from it."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"dora_peft": dora_peft.__version__},
        # the variable names the commit if the files travelled without their repository
        "commit": run_git("rev-parse", "HEAD") or os.environ.get("DORA_PEFT_COMMIT"),
        "modified": bool(run_git("status", "--porcelain", "--", "../dora_peft", "*.py")),
    }


def run_git(*arguments: str) -> str | None:
    """The output of a git command in scripts/, None if there is no git, no repository, or nothing to say."""
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def processor_name() -> str:
    """The processor's model, such as "AMD EPYC"; its architecture if the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
