"""On disk, what the kernels' check has passed with: a file for each GPU, dtype and set of versions.

A file is a note to spare time: one that is missing, broken or cannot be written means that the check is run again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path

import torch

from .._files import atomic_write_text
from .torch_names import cuda_driver_version

_log = logging.getLogger(__name__)
# All that decides what a kernel computes, by name.
Record = dict[str, str]


def record(device: torch.device, dtype: torch.dtype, precision: str) -> Record:
    """All that the outcome of a check depends on."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": version("triton"),
        "dora_peft": _package_version(),
        "kernels": _digest(),
        "dtype": str(dtype),
        "precision": precision,
    }


def holds(wanted: Record) -> bool:
    """Whether the check has passed with this before."""
    path = _path(wanted)
    try:
        return path is not None and json.loads(path.read_text("utf-8")) == wanted
    except FileNotFoundError:
        return False
    # includes text that is neither JSON nor UTF-8
    except (OSError, ValueError) as error:
        _log.info("%s is not read: %s", path, error)
        return False


def remember(passed: Record) -> None:
    """Write down that the check has passed with this, if there is a place for it."""
    path = _path(passed)
    if path is None:
        return
    try:
        atomic_write_text(str(path), json.dumps(passed, indent=2) + "\n")
    except OSError as error:
        _log.info("%s is not written, so the next process checks the kernels again: %s", path, error)


def version(module: str) -> str:
    """As the module says; its package has other names in nightly builds and for AMD."""
    return importlib.import_module(module).__version__


def _path(about: Record) -> Path | None:
    folder = _folder()
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    return None if folder is None else folder / f"kernels-{name}.json"


def _folder() -> Path | None:
    """Beside what Triton has compiled if that has a place of its own, else where programs of this user cache."""
    if triton := os.environ.get("TRITON_CACHE_DIR"):
        return Path(triton).absolute() / "dora_peft"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # relative ones are to be ignored, as its specification says
    folder = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~/.cache"))
    # without a home it stays ~
    return folder / "dora_peft" if folder.is_absolute() else None


def _driver() -> str:
    """The kernel module's line, and the newest CUDA that it can run."""
    try:
        module = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace").partition("\n")[0]
    # not on every system
    except OSError:
        module = "unknown"
    return f"{module}; {cuda_driver_version()}"


def _package_version() -> str:
    try:
        return importlib.metadata.version("dora-peft")
    # used from a checkout, whose kernels have their digest
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _digest() -> str:
    """Of the sources that make kernels: an edited checkout is checked again."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [here / "constants.py", *sorted((here / "kernels").rglob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
