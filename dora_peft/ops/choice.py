"""Which implementation computes: the reference, torch operations, or Triton kernels."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch

from .constants import interpreted
from .torch_names import is_exporting, is_recorded, jit_state, modes, transforming

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
# How one layer computes one forward pass, see `decide`.
How = Literal["dense", "compiled", "torch", "triton"]
# What `implementation` has chosen; written by it alone.
selected = "auto"


# A function to its users; a class, so that it may also open a `with` block.
class implementation:
    """Choose how DoRA layers compute, from here on or for the length of a `with` block.

        dora_peft.implementation("torch")
        with dora_peft.implementation("reference"):
            ...

    Args:
        name: "auto" takes the fastest that runs: "triton" for tensors on a GPU, "torch" elsewhere; "torch" is this
            package's own autograd functions on torch operations; "triton" the same with GPU kernels; "reference" is the
            plain algorithm by autograd, with the dense norm of W0 + s B A at every forward pass, to compare with.

    Raises:
        ValueError: An unknown name.
        RuntimeError: An implementation that is not available here; only "auto" falls back.

    The choice is a property of the process, never of a checkpoint. With gradient checkpointing, backward computes the
    forward pass again, so it has to run under the same choice.
    """

    def __init__(self, name: str) -> None:
        global selected
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, found {name!r}.")
        if name == "triton":
            _require_triton()
        self._before, selected = selected, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global selected
        selected = self._before


def _require_triton() -> None:
    obstacle = None
    if not _has_triton():
        obstacle = "Triton is not installed; install dora-peft[triton]"
    elif not torch.cuda.is_available() and not interpreted():
        obstacle = "torch sees no GPU"
    if obstacle is not None:
        raise RuntimeError(f"implementation('triton') is not available: {obstacle}. Use 'auto' or 'torch'.")


def decide(device: torch.device, *dtypes: torch.dtype) -> How:
    """How a layer computes, for tensors on `device` in these dtypes; asked once by a pass.

    Whether kernels take the norm and the products, whose dtypes differ, is asked with `uses_kernels`, and then kept by
    the layer's shortcut.

    "dense" and "compiled" are plain differentiable operations: torch.compile derives the backward pass itself, and
    chooses better what to keep; torch.func's transforms cannot pass through an autograd function that saves its output;
    a recording must not depend on what was looked up. "dense" computes v from W0 + s B A at each call, "compiled" asks
    the operator `dora_peft::weight_norm`. "torch" and "triton" are autograd functions.
    """
    if computes_densely():
        return "dense"
    if torch.compiler.is_compiling():
        return "compiled"
    return "triton" if uses_kernels(device, *dtypes) else "torch"


def computes_densely() -> bool:
    """Whether v has to be computed by plain operations at each call."""
    return selected == "reference" or transforming() or tracing()


def tracing() -> bool:
    """Whether operations are recorded, to be run later on other values: torch.export, torch.jit.trace, make_fx.

    What is recorded has to compute v from A, B and W0: a value that was looked up would be a constant there.
    """
    if torch.compiler.is_compiling():
        return is_exporting()
    return jit_state() is not None or (modes() > 0 and is_recorded())


def uses_kernels(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether Triton kernels compute what lies on `device` in these dtypes. They have no fp64."""
    if torch.float64 in dtypes or selected not in ("auto", "triton"):
        return False
    return selected == "triton" or (device.type == "cuda" and _has_triton())


# torch.compile runs it as it is, while it traces.
@torch.compiler.assume_constant_result
@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# The modules of kernels import Triton, so they are imported only if they are used.


def layer_kernels() -> ModuleType:
    """The module whose kernels compute a linear layer."""
    from .kernels import fused

    return fused


def norm_kernels() -> ModuleType:
    """The module whose kernels compute v."""
    from .kernels import norm

    return norm


def grouped_norm_kernels() -> ModuleType:
    """The module whose kernels compute v of many layers at once."""
    from .kernels import grouped_norm

    return grouped_norm


@torch.compiler.assume_constant_result
def load_operators() -> None:
    """Register torch.ops.dora_peft.linear."""
    from .kernels import operators  # noqa: F401
