"""An example call of every Triton kernel's launcher, for what compiles all of them: the table and the tests.

`launches(Case(...))` calls them with tensors that have no memory and gives what each kernel would have been launched
with: the signatures, constants and grids of real launches, typed in nowhere. A new launcher needs one line in
`EXAMPLES`, and a function in `WORK` of kernel_work.py for the table's columns of bytes and times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
from torch import Tensor

from dora_peft.bases import FourBit
from dora_peft.ops import kernels
from dora_peft.ops.kernels import dropout, grouped_norm, linear, norm, sample
from dora_peft.ops.kernels.tuning import fitting

MODULES = tuple(
    importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
)
FP32 = torch.float32
# A kernel, its grid and its arguments.
Note = tuple[object, object, dict[str, object]]


@dataclass(frozen=True)
class Case:
    """A layer of [out, features] with an adapter of a rank, and what its kernels depend on; tensors without memory.

    `by_columns`: the gradient, x and W0 are transposed matrices. `on_device`: dropout's seed is a tensor. `group`: out
    and features of the layers that are checked together, two like this one if there are none.
    """

    tokens: int = 2048
    out: int = 4096
    features: int = 4096
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype = FP32
    with_bias: bool = False
    four_bit: bool = False
    by_columns: bool = False
    on_device: bool = False
    group: tuple[tuple[int, int], ...] = ()

    def layers(self) -> list[Case]:
        """Those that are checked together; a group of one is no other."""
        shapes = self.group or ((self.out, self.features),) * 2
        return [dataclasses.replace(self, out=out, features=features, group=()) for out, features in shapes]

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, by_columns: bool = False) -> Tensor:
        if by_columns:
            return torch.empty(shape[::-1], dtype=dtype or self.dtype, device="meta").T
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    @cached_property
    def x(self) -> Tensor:
        return self.tensor(self.tokens, self.features, by_columns=self.by_columns)

    @cached_property
    def z(self) -> Tensor:
        return self.tensor(self.tokens, self.out)

    @cached_property
    def g(self) -> Tensor:
        return self.tensor(self.tokens, self.out, by_columns=self.by_columns)

    @cached_property
    def dx(self) -> Tensor:
        return self.tensor(self.tokens, self.features)

    @cached_property
    def u(self) -> Tensor:
        return self.tensor(self.tokens, self.rank)

    @cached_property
    def A(self) -> Tensor:
        return self.tensor(self.rank, self.features, dtype=self.factors)

    @cached_property
    def B(self) -> Tensor:
        return self.tensor(self.out, self.rank, dtype=self.factors)

    @cached_property
    def folded_B(self) -> Tensor:
        return self.tensor(self.out, self.rank)

    @cached_property
    def c(self) -> Tensor:
        return self.tensor(self.out, dtype=FP32)

    @cached_property
    def bias(self) -> Tensor | None:
        return self.tensor(self.out) if self.with_bias else None

    @cached_property
    def stored(self) -> Tensor | FourBit:
        """W0 as `BaseWeight.stored` gives it."""
        if not self.four_bit:
            return self.tensor(self.out, self.features, by_columns=self.by_columns)
        count = self.out * self.features
        absmax, code = self.tensor(count // 64, dtype=FP32), self.tensor(16, dtype=FP32)
        packed = self.tensor(count // 2, dtype=torch.uint8)
        return FourBit(packed, absmax, code, 64, self.dtype, (self.out, self.features))

    @cached_property
    def seed(self) -> int | Tensor:
        return self.tensor(1, dtype=torch.int64) if self.on_device else 2**62 - 1

    def memory(self) -> norm.Memory:
        return norm.Memory(self.out, torch.device("meta"))


OF_ALL = "check and norm of all"
# By name, in the table's order: calls that launch every kernel at least once.
EXAMPLES: dict[str, Callable[[Case], object]] = {
    "compose": lambda t: linear.scaled_sum(t.z, t.u, t.B, t.c, t.bias, 0.5, out=t.z),
    "compose, folded": lambda t: linear.scaled_sum(t.z, t.u, t.folded_B, t.c, t.bias, None, out=t.z),
    "scale": lambda t: linear.scale_and_sum(t.g, t.c, None, t.bias),
    "scale and sum": lambda t: linear.scale_and_sum(t.g, t.c, t.z, t.bias),
    "magnitude": lambda t: linear.magnitude_gradient(
        linear.scale_and_sum(t.g, t.c, t.z, t.bias)[1], t.g, t.z, t.x, t.stored, t.u, t.B, t.c, t.bias, 0.5,
        t.tensor(1, dtype=torch.int32),
    ),
    "dropped product": lambda t: dropout.dropped_product(t.x, t.A, t.seed, 0.05),
    "add low rank": lambda t: dropout.add_low_rank(t.dx, t.u, t.A, t.seed, 0.05),
    "low rank": lambda t: dropout.add_low_rank(None, t.u, t.A, t.seed, 0.05),
    "dropped gradient": lambda t: dropout.dropped_gradient(t.u, t.x, t.seed, 0.05, t.factors),
    "norm": lambda t: norm.row_norms(t.stored, t.c, t.A, t.B, 0.5),
    "check and norm": lambda t: norm.checked_norm(t.memory(), t.stored, t.A, t.B, 0.5, due=False, another=False),
    OF_ALL: lambda t: grouped_norm.Group(
        [grouped_norm.Entry(layer.memory(), layer.stored, layer.A, layer.B, 0.5) for layer in t.layers()]
    ).check(0, False),
    "take sample": lambda t: sample.keep_sample(
        t.z, t.tensor(sample.sample_size(t.out, 512, t.dtype)), 0, 1, 257, t.out, 512
    ),
    "compare sample": lambda t: sample.compare_sample(t.z, t.tensor(t.out), t.tensor(512), 0, 1, 257),
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What a kernel would have been launched with, by the names of its arguments.

    Attributes:
        example: Of EXAMPLES.
        name: The kernel's module and name.
        case: The layer.
    """

    example: str
    name: str
    kernel: object
    grid: object
    arguments: dict[str, object]
    case: Case

    @property
    def function(self) -> object:
        return _function(self.kernel)

    def configs(self, shared_kib: int = 1024) -> list[triton.Config]:
        """Those offered to a GPU with so much shared memory a program; that of the launch if it names one itself."""
        if getattr(self.kernel, "configs", None):
            return fitting(self.kernel.configs, shared_kib)
        options = {name: self.arguments[name] for name in ("num_warps", "num_stages") if name in self.arguments}
        return [triton.Config({}, **options)]

    def programs(self, config: triton.Config) -> int:
        grid = self.grid({**self.arguments, **config.kwargs}) if callable(self.grid) else self.grid
        return torch.Size(grid).numel()


class _Recorder:
    """Stands in a module where a kernel stood."""

    def __init__(self, kernel: object, notes: list[Note]) -> None:
        self.kernel, self.notes = kernel, notes

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: object, **constants: object) -> None:
            named = dict(zip(_function(self.kernel).arg_names, args, strict=False))
            self.notes.append((self.kernel, grid, {**named, **constants}))

        return launch


def _function(kernel: object) -> object:
    """The function under the list of configurations."""
    return kernel.fn if hasattr(kernel, "configs") else kernel


@lru_cache
def kernels_of() -> dict[str, object]:
    """The kernels that are launched, by module and name: not the functions that kernels call."""
    found = {
        f"{module.__name__.rpartition('.')[2]}.{name}": kernel
        for module in MODULES
        for name, kernel in vars(module).items()
        if hasattr(_function(kernel), "arg_names") and _function(kernel).fn.__module__ == module.__name__
    }
    sources = "".join(inspect.getsource(_function(kernel).fn) for kernel in found.values())
    called = set(re.findall(r"(?<!def )\b(\w+)\(", sources))
    # one function may be launched under several names, each with configurations of its own
    tuned = {id(kernel.fn) for kernel in found.values() if hasattr(kernel, "configs")}
    return {
        name: kernel
        for name, kernel in found.items()
        if name.partition(".")[2] not in called and id(kernel) not in tuned
    }


@contextlib.contextmanager
def _recorded() -> Iterator[list[Note]]:
    notes: list[Note] = []
    modules = {module.__name__.rpartition(".")[2]: module for module in MODULES}
    places = [(modules[name.partition(".")[0]], name.partition(".")[2]) for name in kernels_of()]
    for (module, name), kernel in zip(places, kernels_of().values(), strict=True):
        setattr(module, name, _Recorder(kernel, notes))
    try:
        yield notes
    finally:
        for (module, name), kernel in zip(places, kernels_of().values(), strict=True):
            setattr(module, name, kernel)


def launches(case: Case, examples: Iterable[str] | None = None) -> list[Launch]:
    """What the examples launch for a layer like `case`, each kernel once an example."""
    names = {id(kernel): name for name, kernel in kernels_of().items()}
    found = []
    for example in EXAMPLES if examples is None else examples:
        with _recorded() as notes:
            EXAMPLES[example](case)
        last = {id(note[0]): Launch(example, names[id(note[0])], *note, case) for note in notes}
        # what another example launches for this one is not what it is about
        found += list(last.values())[-1:] if example == "magnitude" else last.values()
    return found
