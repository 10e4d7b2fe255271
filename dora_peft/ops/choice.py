"""Which implementation computes: the reference, torch operations, or Triton kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch

from . import selfcheck
from .constants import interpreted
from .torch_names import is_capturing, is_recorded, jit_state, modes, transforming

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
# How one layer computes one forward pass, see `decide`.
How = Literal["dense", "compiled", "torch", "triton"]
# What `implementation` has chosen; written by it alone.
selected = "auto"
# What `selected`, a device and dtypes asked for; True if kernels compute.
Question = tuple[str, torch.device, tuple[torch.dtype, ...]]
_answers: dict[Question, bool] = {}
# Asked where no kernel can be tried, and so answered by torch's road for that pass alone.
_postponed: set[Question] = set()
# Another word whenever one of those is answered. Graphs that torch.compile has made are guarded by it; of a number the
# compiler would make a variable.
_era = "0"


# A function to its users; a class, so that it may also open a `with` block.
class implementation:
    """Choose how DoRA layers compute, from here on or for the length of a `with` block.

        dora_peft.implementation("torch")
        with dora_peft.implementation("reference"):
            ...

    Args:
        name: "auto" takes the fastest that runs: "triton" for tensors on a GPU on which every kernel gives what torch
            gives, as a check finds once, "torch" elsewhere; "torch" is this package's own autograd functions on torch
            operations; "triton" the same with GPU kernels; "reference" is the plain algorithm by autograd, with the
            dense norm of W0 + s B A at every forward pass, to compare with.

    Raises:
        ValueError: An unknown name, or an environment variable DORA_PEFT_KERNELS that is neither 0 nor 1.
        RuntimeError: An implementation that is not available here; only "auto" falls back. "triton" checks the kernels
            for adapters in fp32 here, and for another dtype or GPU raises when a layer first computes there.

    In the environment, DORA_PEFT_KERNELS=0 has no kernel of this package run on a GPU, and DORA_PEFT_KERNELS=1 has
    "auto" check and use them also where nobody has tried them yet: another kind of GPU, a newer Triton. It is read when
    a device is first used.

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
    if not selfcheck.has_triton():
        obstacle = "Triton is not installed (pip install triton)"
    elif not torch.cuda.is_available():
        obstacle = None if interpreted() else "torch sees no GPU"
    elif _can_try():
        here = torch.device("cuda", torch.cuda.current_device())
        obstacle = selfcheck.obstacle(here, (torch.float32,), True)
    if obstacle is not None:
        raise _unavailable(obstacle)


def _unavailable(obstacle: str) -> RuntimeError:
    return RuntimeError(f"implementation('triton') is not available: {obstacle}. Use 'auto' or 'torch'.")


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
        return torch.compiler.is_exporting()
    return jit_state() is not None or (modes() > 0 and is_recorded())


def uses_kernels(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether Triton kernels compute what lies on `device` in these dtypes. They have no fp64.

    The first question about a GPU and a dtype checks the kernels there, unless a CUDA graph is being captured or
    something is traced, where nothing can be tried: torch's operations compute that pass then, and the next question
    outside of it decides. A graph of torch.compile is made again when it has been decided.

    Raises:
        RuntimeError: implementation("triton") was chosen, and its kernels do not run right here.
    """
    if torch.compiler.is_compiling():
        return _while_tracing(_era, selected, device, dtypes)
    question = (selected, device, dtypes)
    known = _answers.get(question)
    return _answer(question) if known is None else known


# torch.compile runs it as it is, while it traces.
@torch.compiler.assume_constant_result
def _while_tracing(era: str, name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    """`uses_kernels` for the compiler, to whose graph the answer is a constant as long as `era` and `name` are."""
    question = (name, device, dtypes)
    known = _answers.get(question)
    return _answer(question, can_try=False) if known is None else known


def is_decided(device: torch.device) -> bool:
    """Whether all that was asked about `device` has its final answer, so that what follows from it may be kept."""
    return not any(where == device for _, where, _ in _postponed)


def _answer(question: Question, *, can_try: bool | None = None) -> bool:
    """The answer to a question that has none yet; kept, unless it is to be decided later."""
    name, device, dtypes = question
    if name not in ("auto", "triton") or torch.float64 in dtypes:
        used = False
    elif device.type != "cuda":
        # for its error alone, which those without a GPU are to see as well
        selfcheck.wish()
        # the interpreter takes tensors of any device
        used = name == "triton"
    elif device.index is None:
        # that which is current now
        return _answer((name, torch.device("cuda", torch.cuda.current_device()), dtypes), can_try=can_try)
    elif not (_can_try() if can_try is None else can_try) and selfcheck.has_to_run(device, dtypes, name == "triton"):
        _postponed.add(question)
        # so that whatever is asked next about this device, outside, comes here and decides
        for other in [other for other in list(_answers) if other[1] == device]:
            _answers.pop(other, None)
        return name == "triton"
    else:
        used = _on_gpu(name, device, dtypes)
        if can_try is not False:
            _decide_postponed(name, device)
    _answers[question] = used
    return used


def _decide_postponed(name: str, device: torch.device) -> None:
    """Answer what could not be answered before."""
    global _era
    waiting = [question for question in list(_postponed) if question[1] == device]
    if waiting:
        _postponed.difference_update(waiting)
        _era = str(int(_era) + 1)
        for question in waiting:
            if question[0] == name:
                _answers[question] = _on_gpu(*question)


def _on_gpu(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    obstacle = selfcheck.obstacle(device, dtypes, name == "triton")
    if obstacle is not None and name == "triton":
        raise _unavailable(obstacle)
    return obstacle is None


def _can_try() -> bool:
    """Whether kernels can be run here and now, and waited for."""
    return not (torch.compiler.is_compiling() or transforming() or tracing() or is_capturing())


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
