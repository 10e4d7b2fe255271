"""An example call of every Triton kernel's launcher, for what compiles all of them: the table and the tests.

`launches(Case(...))` calls them with tensors that have no memory and gives what each kernel would have been launched
with: the signatures, constants and grids of real launches, typed in nowhere. A new launcher needs one line in
`EXAMPLES`, and a function in `WORK` for the table's columns of bytes and times.
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
Numbers = dict[str, int]
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


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        ideal: Bytes that it cannot do without: each input read once, each output written once.
        asked: Bytes that its programs ask for; those of them that are asked for again mostly come from the L2 cache.
        flops: Of its matrix products.
        iterations: How often a program goes through its main loop.
        blocks: What the programs take one after another, if they do: a loop around the main one.
        branches: Of how many of equal length a program takes one.
    """

    ideal: int
    asked: int
    flops: int
    iterations: int
    blocks: int = 0
    branches: int = 1


def work(launch: Launch, config: triton.Config) -> Work | None:
    """What a launch does; None if nobody counted it."""
    count, together = (counts.get(launch.function.__name__) for counts in (WORK, WORK_OF_ALL))
    if count is None and together is None:
        return None
    numbers = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
    sizes = {name: value.element_size() for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    numbers |= config.kwargs
    return count(numbers, sizes) if count else together(launch.case.layers(), numbers, sizes)


def _compose(n: Numbers, size: Numbers) -> Work:
    tensors = 2 * n["length"] * n["width"] * size["z"]
    u, factor = n["length"] * n["rank"] * size["u"], n["width"] * n["rank"] * size["lora_B"]
    vectors = n["width"] * (size["c"] + n["HAS_BIAS"] * size["bias"])
    across, down = triton.cdiv(n["width"], n["COLUMNS"]), triton.cdiv(n["length"], n["ROWS"])
    asked = tensors + across * u + down * (factor + vectors)
    flops = 2 * n["length"] * n["width"] * n["rank"]
    return Work(tensors + u + factor + vectors, asked, flops, triton.cdiv(n["rank"], n["RANKS"]))


def _scale(n: Numbers, size: Numbers) -> Work:
    tensors = (2 + n["SUM"]) * n["length"] * n["width"] * size["g"]
    vectors = n["width"] * (size["c"] + n["HAS_BIAS"] * size["bias"])
    stripes = triton.cdiv(n["length"], n["stripe"])
    sums = n["SUM"] * stripes * n["width"] * size["sums"]
    iterations = triton.cdiv(n["stripe"], n["ROWS"])
    return Work(tensors + vectors + sums, tensors + stripes * vectors + sums, 0, iterations)


def _magnitude(n: Numbers, size: Numbers) -> Work:
    """Where no column was lost, as in training that goes well."""
    sample = n["HAS_BIAS"] * n["width"] * (size["bias"] + min(n["SAMPLE"], n["length"]) * size["y"])
    total = n["width"] * (n["stripes"] * size["sums"] + size["c"] + size["out"]) + sample
    return Work(total, total, 0, 1)


def _dropped_product(n: Numbers, size: Numbers) -> Work:
    x, out = n["length"] * n["features"] * size["x"], n["length"] * n["rank"] * size["out"]
    factor = n["rank"] * n["features"] * size["lora_A"]
    asked = triton.cdiv(n["rank"], n["RANKS"]) * x + triton.cdiv(n["length"], n["ROWS"]) * factor + out
    flops = 2 * n["length"] * n["features"] * n["rank"]
    return Work(x + factor + out, asked, flops, triton.cdiv(n["features"], n["BLOCK"]))


def _add_low_rank(n: Numbers, size: Numbers) -> Work:
    tensors = (1 + n["ADD"]) * n["length"] * n["features"] * size["out"]
    du, factor = n["length"] * n["rank"] * size["du"], n["rank"] * n["features"] * size["lora_A"]
    across, down = triton.cdiv(n["features"], n["BLOCK"]), triton.cdiv(n["length"], n["ROWS"])
    flops = 2 * n["length"] * n["features"] * n["rank"]
    return Work(tensors + du + factor, tensors + across * du + down * factor, flops, triton.cdiv(n["rank"], n["RANKS"]))


def _dropped_gradient(n: Numbers, size: Numbers) -> Work:
    x, du = n["length"] * n["features"] * size["x"], n["length"] * n["rank"] * size["du"]
    out = n["rank"] * n["features"] * size["out"]
    parts = triton.cdiv(n["length"], n["stripe"]) * out
    asked = triton.cdiv(n["rank"], n["RANKS"]) * x + triton.cdiv(n["features"], n["BLOCK"]) * du + parts
    flops = 2 * n["length"] * n["features"] * n["rank"]
    return Work(x + du + out, asked, flops, triton.cdiv(n["stripe"], n["ROWS"]))


def _norm(n: Numbers, size: Numbers) -> Work:
    """Of a check, where v is due and W0 is the same."""
    count, rows = n["height"] * n["width"], triton.cdiv(n["height"], n["ROWS"])
    # half a byte an element and a statistic for each block of them
    weight = count // 2 + count // n["blocksize"] * size["absmax"] if n["FOUR_BIT"] else count * size["weight"]
    A, B = n["rank"] * n["width"] * size["lora_A"], n["height"] * n["rank"] * size["lora_B"]
    # of a check also ||W0||^2 and what is remembered
    out = n["height"] * (size["out"] + size.get("base", 0) + size.get("remembered", 0))
    partial = 2 * n["spans"] * n["height"] * size["partial"] if n["spans"] > 1 else 0
    asked = weight + rows * A + n["spans"] * B + out + partial
    return Work(weight + A + B + out, asked, 2 * count * n["rank"], triton.cdiv(n["columns"], n["BLOCK"]))


WORK: dict[str, Callable[[Numbers, Numbers], Work]] = {
    "_scaled_sum": _compose,
    "_scale_and_sum": _scale,
    "_magnitude_gradient": _magnitude,
    "_dropped_product": _dropped_product,
    "_add_low_rank": _add_low_rank,
    "_dropped_gradient": _dropped_gradient,
    "_norm": _norm,
    "_checked_norm": _norm,
}


def _refresh_all(layers: list[Case], n: Numbers, size: Numbers) -> Work:
    """Where v of all layers is due and W0 is the same."""
    fp32 = dict.fromkeys(("absmax", "out", "base", "remembered", "partial"), 4)
    size = {**size, **fp32, "weight": size["like_W"], "lora_A": size["like_A"], "lora_B": size["like_A"]}
    total, iterations, blocks = [0, 0, 0], 0, 0
    for layer in layers:
        spans, columns = norm.division(layer.out, layer.features)
        shape = {"height": layer.out, "width": layer.features, "rank": layer.rank, "spans": spans, "columns": columns}
        done = _norm({**n, **shape, "blocksize": layer.stored.blocksize if layer.four_bit else 1}, size)
        total = [a + b for a, b in zip(total, (done.ideal, done.asked, done.flops), strict=True)]
        here = triton.cdiv(layer.out, n["ROWS"]) * spans
        iterations, blocks = iterations + here * done.iterations, blocks + here
    return Work(*total, triton.cdiv(iterations, blocks), blocks)


def _check_all(layers: list[Case], n: Numbers, size: Numbers) -> Work:
    """A and B whole, and the sample of W0, whose elements lie in 32 bytes of memory each, which are read with them."""
    factors = sum((layer.A.numel() + layer.B.numel()) * size["like_A"] for layer in layers)
    taken = len(layers) * n["SAMPLE"] * (2 if n["FOUR_BIT"] else 1)
    smallest = min(size["like_W"], size["like_S"]) if n["FOUR_BIT"] else size["like_W"]
    return Work(factors + taken * smallest, factors + taken * 32, 0, 1, branches=3)


# Of kernels that take many layers.
WORK_OF_ALL: dict[str, Callable[[list[Case], Numbers, Numbers], Work]] = {
    "_refresh_all": _refresh_all,
    "_check_all": _check_all,
}
