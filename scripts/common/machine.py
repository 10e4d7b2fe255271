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

# Those that libraries of matrix products choose their code by, as Linux names them: of x86, then of Arm.
SETS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
SETS += ("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, instruction sets of the processor, threads, versions of the packages, git commit if there is one.

    And whether the code differs from that commit.
    """
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "processor": processor_name(),
        "instruction_sets": instruction_sets(),
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
    return processor_line("model name") or platform.processor() or platform.machine()


def instruction_sets() -> dict[str, Any]:
    """What decides which library multiplies faster: the level that torch's own loops use, and the processor's sets.

    torch's level, such as "AVX512", can be lowered by ATEN_CPU_CAPABILITY; the sets are empty where the system does
    not name them.
    """
    named = set(processor_line("flags").split()) or set(processor_line("Features").split())
    return {"torch": torch.backends.cpu.get_cpu_capability(), "processor": [name for name in SETS if name in named]}


def processor_line(name: str) -> str:
    """What Linux says of the first processor under a name, empty if nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
