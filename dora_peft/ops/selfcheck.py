"""Whether a GPU's kernels can be trusted: gates on what nobody has tried, then a check of every kernel, once a dtype.

`obstacle` gives the reason why not, and remembers it for the process. What passed is remembered on disk as well, see
passed.py, so that the next process starts without the check, which compiles every kernel.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from packaging.version import Version

from . import passed
from .constants import interpreted

# Triton's versions, oldest and newest, that every kernel is compiled by for each GPU (tests/compile_kernels.py).
# Older ones are not supported by pyproject.toml; newer ones may compile something else, or nothing.
TESTED_TRITON = ("3.2", "3.7")
# Before it, matrix units have neither bf16 nor tf32.
LEAST_CAPABILITY = (8, 0)
VARIABLE = "DORA_PEFT_KERNELS"
_log = logging.getLogger(__name__)
# x and W0 may be of these. Others come to kernels as fp32.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Why a device's kernels are not used for a dtype, None if they are.
_known: dict[tuple[torch.device, torch.dtype], str | None] = {}
_warned: set[tuple[torch.device, str]] = set()
# Two threads would check twice at the first forward pass.
_lock = threading.RLock()
# Whether who asks for kernels by name gets them unchecked.
_trusting = False


class NotAllowed(str):
    """A reason that is the user's own wish, of which nothing needs to be said."""


def wish() -> bool | None:
    """What the environment says of kernels: True to try them where nobody has, False never, None if it says nothing.

    Raises:
        ValueError: It says something else.
    """
    found = os.environ.get(VARIABLE, "").strip()
    if found not in ("", "0", "1"):
        raise ValueError(
            f"The environment variable {VARIABLE} must be 0 (never use this package's GPU kernels), 1 (check and use "
            f"them also on a GPU or Triton on which nobody has tried them) or unset, found {found!r}."
        )
    return {"": None, "0": False, "1": True}[found]


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def trusting() -> Iterator[None]:
    """In the `with` block implementation("triton") takes the kernels as they are, in every thread.

    For a program that compares all results itself, and is to find every fault at once: scripts/check_gpu.py.
    """
    global _trusting
    before, _trusting = _trusting, True
    try:
        yield
    finally:
        _trusting = before


def has_to_run(device: torch.device, dtypes: tuple[torch.dtype, ...], asked: bool = False) -> bool:
    """Whether `obstacle` would run kernels to answer."""
    if wish() is False or (_trusting if asked else _gate(device) is not None):
        return False
    return any((device, dtype) not in _known for dtype in _checked(dtypes))


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], asked: bool = False) -> str | None:
    """Why kernels are not to be used on a GPU for tensors of these dtypes; None if they may be.

    Not to be called while a CUDA graph is captured, or while anything is traced: it may run the kernels, and waits for
    them. Warns once of each device and reason, unless `asked`.

    Args:
        device: With its index.
        asked: Whether the caller wants the kernels by name, which skips the gates as DORA_PEFT_KERNELS=1 does.
    """
    with _lock:
        if wish() is False:
            return NotAllowed(f"the environment variable {VARIABLE} is 0")
        if asked and _trusting:
            return None
        if not asked and (gate := _gate(device)) is not None:
            return _told(device, gate)
        for dtype in _checked(dtypes):
            key = (device, dtype)
            if key not in _known:
                _known[key] = _failure(device, dtype)
            reason = _known[key]
            if reason is not None:
                return reason if asked else _told(device, reason)
        return None


def _checked(dtypes: tuple[torch.dtype, ...]) -> list[torch.dtype]:
    """Those that are checked for these."""
    return list(dict.fromkeys(dtype if dtype in _DTYPES else torch.float32 for dtype in dtypes))


def _told(device: torch.device, reason: str) -> str:
    """The reason, of which the user was warned if something is to be said of it."""
    if not isinstance(reason, NotAllowed) and (device, reason) not in _warned:
        _warned.add((device, reason))
        warnings.warn(
            f"dora_peft computes by torch's operations on {device} ({torch.cuda.get_device_name(device)}), not by its "
            f"own kernels: {reason}. Set the environment variable {VARIABLE}=0 to choose this without a warning.",
            UserWarning,
            stacklevel=2,
        )
    return reason


def _gate(device: torch.device) -> str | None:
    """What speaks against even trying; nothing if the user wants to."""
    if not has_triton():
        # as torch comes for some systems; said only to those who asked for kernels
        return "Triton is not installed" if wish() else NotAllowed("Triton is not installed")
    if wish():
        return None
    try_it = f"{VARIABLE}=1 checks and uses them all the same"
    if torch.version.hip:
        return f"they have not run on an AMD GPU yet; {try_it}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
        return f"they are made for compute capability {least} and above, it has {has}; {try_it}"
    oldest, newest = TESTED_TRITON
    try:
        found = passed.version("triton")
    # whatever its import runs into
    except Exception as error:
        return f"Triton cannot be imported ({_said(error)})"
    if not Version(oldest).release <= Version(found).release[:2] <= Version(newest).release:
        return f"they are tested with Triton {oldest} to {newest}, found {found}; {try_it}"
    return None


def _failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """What went wrong when each kernel was run once, None if nothing did."""
    try:
        from .kernels import selfcheck
        from .kernels.options import precision

        record = None if interpreted() else passed.record(device, dtype, precision(dtype))
        if record is not None and passed.holds(record):
            return None
        _log.info("checking the kernels on %s in %s, which compiles them; once, unless a cache is lost", device, dtype)
        selfcheck.run(device, dtype)
    # Triton, its compiler and the driver raise all kinds; whichever it is, the user is told, and torch computes
    except Exception as error:
        _require_usable(device, error)
        return _said(error)
    if record is not None:
        passed.remember(record)
    return None


def _require_usable(device: torch.device, error: Exception) -> None:
    """torch's operations can take over only if the GPU still answers.

    Raises:
        RuntimeError: It does not.
    """
    try:
        torch.cuda.synchronize(device)
    except Exception as lost:
        raise RuntimeError(
            f"A check of dora_peft's kernels left {device} unusable for this process ({_said(error)}). Start again "
            f"with the environment variable {VARIABLE}=0, which leaves these kernels alone."
        ) from lost


def _said(error: Exception) -> str:
    """An error in one line: compilers write pages, of which the first or the last line says what is wrong."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = " ... ".join(line.strip()[:300] for line in dict.fromkeys((lines[0], lines[-1]))).rstrip(".")
    return text if type(error).__name__ == "KernelMismatch" else f"{type(error).__name__}: {text}"
