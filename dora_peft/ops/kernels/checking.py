"""What the checks in selfcheck.py are made of and run by: little guarded tensors, and their comparison with torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources

from ...bases import FourBit
from .guarded import Guarded
from .launch import Kernel
from .options import precision
from .tuning import INTERPRETED

# Odd, and above the blocks of 64.
TOKENS, WIDTH, RANK = 71, 64, 16
# How far a number may be off, as a part of the largest: some units in the last place of what is multiplied.
_TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 2.0**-13}
_TF32_TOLERANCE = 2.0**-8


@dataclass(frozen=True, slots=True)
class Result:
    """What a kernel gave and what it should have, the latter in fp64 on the CPU; within `tolerance`, if it is given."""

    name: str
    found: Tensor
    expected: Tensor
    tolerance: float | None = None


class KernelMismatch(RuntimeError):
    """A kernel gave something else than torch's operations."""


class Problem:
    """A linear layer's tensors, guarded, on a device and in one dtype; attributes as in linear.py.

    Args:
        memory: Where `place` puts them; torch's allocations are its as long as it is entered.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, memory: Guarded) -> None:
        self.device, self.dtype, self.memory = device, dtype, memory
        # the user's random numbers stay as they are
        self._generator = torch.Generator("cpu").manual_seed(0)
        self.x, self.g = self.random(TOKENS, WIDTH), self.random(TOKENS, WIDTH)
        self.weight = self.random(WIDTH, WIDTH, scale=WIDTH**-0.5)
        self.z, self.y = self.random(TOKENS, WIDTH), self.random(TOKENS, WIDTH)
        self.u, self.du = self.random(TOKENS, RANK), self.random(TOKENS, RANK)
        self.bias = self.random(WIDTH)
        # as PEFT keeps adapters, also over a base in low precision
        self.A = self.random(RANK, WIDTH, scale=WIDTH**-0.5, dtype=torch.float32)
        self.B = self.random(WIDTH, RANK, scale=RANK**-0.5, dtype=torch.float32)
        self.c = self.place(1 + 0.3 * self._normal(WIDTH).tanh())

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return self.place((scale * self._normal(*shape)).to(dtype or self.dtype))

    def whole(self, high: int, *shape: int) -> Tensor:
        """Whole numbers below `high`, uint8."""
        return self.place(torch.randint(high, shape, generator=self._generator, dtype=torch.uint8, device="cpu"))

    def place(self, tensor: Tensor) -> Tensor:
        """A copy on the device, guarded."""
        return self.memory.place(tensor.to(self.device, copy=True))

    def four_bit(self) -> tuple[FourBit, Tensor]:
        """A 4-bit W0 [WIDTH, WIDTH], and the same densely in fp64."""
        blocksize = 64
        packed = self.whole(256, WIDTH * WIDTH // 2)
        absmax = self.place(0.1 + self._normal(WIDTH * WIDTH // blocksize).abs())
        code = self.place(torch.linspace(-1, 1, 16, dtype=torch.float32, device="cpu"))
        bytes_ = packed.cpu().long()
        nibbles = torch.stack([bytes_ >> 4, bytes_ & 15], 1).view(-1, blocksize)
        dense = (code.cpu()[nibbles] * absmax.cpu()[:, None]).to(self.dtype).view(WIDTH, WIDTH)
        return FourBit(packed, absmax, code, blocksize, self.dtype, (WIDTH, WIDTH)), dense.double()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")


Check = Callable[[Problem], Iterator[Result]]
# With the kernels that each of them runs.
_CHECKS: list[tuple[Check, Sequence[Kernel]]] = []


def checks(*kernels: Kernel) -> Callable[[Check], Check]:
    """Register the check of these kernels, which is run in every configuration that they offer."""

    def register(check: Check) -> Check:
        _CHECKS.append((check, kernels))
        return check

    return register


def checked_kernels() -> list[Kernel]:
    """Every kernel that has a check."""
    return [kernel for _, kernels in _CHECKS for kernel in kernels]


def run(device: torch.device, dtype: torch.dtype) -> None:
    """Check every kernel on `device` with x and W0 in `dtype`, and adapters in fp32.

    Changes nothing of the caller's: no random state, mode, dtype, device or stream.

    Raises:
        KernelMismatch: A kernel is wrong; names it.
        Exception: What Triton raises if it cannot compile or launch a kernel.
    """
    for _, error in run_each(device, dtype):
        if error is not None:
            raise error


def run_each(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Exception | None]]:
    """Each check by its name, with what `run` would raise of it; one that fails hides no other."""
    for check, kernels in _CHECKS:
        error: Exception | None = None
        with _undisturbed(device):
            try:
                _check_configurations(check, kernels, device, dtype)
            # Triton, its compiler and the driver raise all kinds
            except Exception as raised:
                error = raised
        yield check.__name__, error


def _check_configurations(check: Check, kernels: Sequence[Kernel], device: torch.device, dtype: torch.dtype) -> None:
    # one where nothing is tuned
    count = max(1, *(len(kernel.configs) for kernel in kernels))
    refused: list[Exception] = []
    for number in range(count):
        with ExitStack() as stack:
            for kernel in kernels:
                stack.enter_context(kernel.configured(number))
            try:
                # first by Triton's own call, and then as every later launch goes
                for _ in range(1 if INTERPRETED else 2):
                    _run(check, device, dtype)
            except (OutOfResources, CompileTimeAssertionFailure) as error:
                # tuning leaves it out as well: this GPU cannot run it
                refused.append(error)
    if len(refused) == count:
        raise refused[0]


def _run(check: Check, device: torch.device, dtype: torch.dtype) -> None:
    memory = Guarded()
    with memory:
        for result in check(Problem(device, dtype, memory)):
            _compare(check, result, dtype)
    if memory.overrun():
        raise KernelMismatch(f"the check {_named(check, dtype)} found something written beyond the end of a tensor")


def _compare(check: Check, result: Result, dtype: torch.dtype) -> None:
    found, expected, tolerance = exact(result.found), result.expected, result.tolerance
    if tolerance is None:
        tolerance = _TF32_TOLERANCE if precision(dtype) == "tf32" else _TOLERANCE[dtype]
    where = f"the check {_named(check, dtype)} found that {result.name}"
    if found.shape != expected.shape:
        raise KernelMismatch(f"{where} is of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    # not a number is not within it
    distance = ((found - expected).abs().max() / expected.abs().max()).item()
    if not distance <= tolerance:
        raise KernelMismatch(f"{where} is off by {distance:.1e} of its largest number; {tolerance:.1e} is allowed")


def _named(check: Check, dtype: torch.dtype) -> str:
    return f"of kernel {check.__name__} in {str(dtype).removeprefix('torch.')}"


def exact(tensor: Tensor) -> Tensor:
    """In fp64 on the CPU, where neither TF32 nor a library of the GPU takes part."""
    return tensor.detach().cpu().double()


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever the caller computes under stays as it is, and does not reach the check."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        try:
            if deterministic:
                # cuBLAS refuses then, unless an environment variable is set
                torch.use_deterministic_algorithms(False)
            yield
        finally:
            if deterministic:
                torch.use_deterministic_algorithms(True, warn_only=warn_only)
