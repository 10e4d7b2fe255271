"""Which implementation computes: the reference, torch operations, or Triton kernels."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .constants import interpreted

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
_implementation = "auto"
_modules: dict[str, Any] = {}


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
        global _implementation
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, found {name!r}.")
        if name == "triton":
            _require_triton()
        self._before, _implementation = _implementation, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        global _implementation
        _implementation = self._before


def _require_triton() -> None:
    obstacle = None
    if importlib.util.find_spec("triton") is None:
        obstacle = "Triton is not installed; install dora-peft[triton]"
    elif not torch.cuda.is_available() and not interpreted():
        obstacle = "torch sees no GPU"
    if obstacle is not None:
        raise RuntimeError(f"implementation('triton') is not available: {obstacle}. Use 'auto' or 'torch'.")


def use_reference() -> bool:
    return _implementation == "reference"


def transforming() -> bool:
    """Whether a torch.func transform is at work."""
    return torch._C._are_functorch_transforms_active()


def tracing() -> bool:
    """Whether operations are recorded, to be run later on other values: torch.export, torch.jit.trace, make_fx.

    What is recorded has to compute v from A, B and W0: a value that was looked up would be a constant there.
    """
    if torch.compiler.is_compiling():
        return _is_exporting()
    return torch._C._get_tracing_state() is not None or (torch._C._len_torch_dispatch_stack() > 0 and _is_recorded())


def _is_exporting() -> bool:
    ask = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
    return ask() if ask is not None else torch.compiler._is_exporting_flag


def _is_recorded() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(isinstance(m, (ProxyTorchDispatchMode, FakeTensorMode)) for m in _get_current_dispatch_mode_stack())


def by_autograd() -> bool:
    """Whether to compute by plain differentiable operations instead of autograd functions of our own.

    torch.compile derives the backward pass itself, and chooses better what to keep; torch.func transforms cannot pass
    through an autograd function that saves its output; a recording must not depend on what was looked up.
    """
    if _implementation == "reference" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._get_tracing_state() is not None or (torch._C._len_torch_dispatch_stack() > 0 and _is_recorded())


def uses_kernels(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether Triton kernels compute what lies on `device` in these dtypes. They have no fp64."""
    if torch.float64 in dtypes or _implementation not in ("auto", "triton"):
        return False
    return _implementation == "triton" or (device.type == "cuda" and _has_triton())


@torch.compiler.assume_constant_result  # torch.compile runs it as it is, while it traces
def _has_triton() -> bool:
    if "triton" not in _modules:
        _modules["triton"] = importlib.util.find_spec("triton")
    return _modules["triton"] is not None


def fused(tensor: Tensor, *others: Tensor) -> Any:
    """The module `fused`, whose kernels compute the layer for these tensors, or None."""
    return _module("kernels.fused") if uses_kernels(tensor.device, tensor.dtype, *(t.dtype for t in others)) else None


@torch.compiler.assume_constant_result
def load_operators() -> None:
    """Register torch.ops.dora_peft.linear."""
    _module("kernels.operators")


def kernels() -> Any:
    """The module `kernels.sample`, where Triton is known to be there."""
    return _module("kernels.sample")


def norm_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module `norm_kernels` for a weight on `device` that accumulates in `dtype`, or None."""
    return _module("kernels.norm") if uses_kernels(device, dtype) else None


def _module(name: str) -> Any:
    if name not in _modules:
        _modules[name] = importlib.import_module(f".{name}", __package__)  # imports Triton, so only where it is used
    return _modules[name]
