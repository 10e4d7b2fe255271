"""How every Triton kernel of this folder is launched: on the device of its tensors, and without Triton's own binder.

Triton launches on the *current* device, whatever its tensors lie on: with a model over two GPUs, a layer on the second
would be computed by the first. And its own call takes 20 to 80 us of Python to find the machine code that belongs to
the arguments, several times a layer. So a `Kernel` enters the device of its tensors, and remembers by what Triton
distinguishes (see `Kernel._reader`) which machine code Triton took; from the second launch on it goes there directly.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..torch_names import raw_stream

Argument: TypeAlias = Tensor | int | float
Constant: TypeAlias = int | float | str
# How many programs run; may depend on the constants that are whole numbers.
Grid: TypeAlias = tuple[int, ...] | Callable[[Mapping[str, int]], tuple[int, ...]]

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Those whose compiled kernels take what `Kernel._launch` gives them. Other versions are called by their public
# interface alone, at the price of its time: what a compiled kernel takes is no interface that Triton promises.
_DIRECT = (3, 2) <= _VERSION <= (3, 7)
# From 3.3 on a compiled kernel takes, and leaves out, the constants as well.
_TAKES_CONSTANTS = _VERSION >= (3, 3)

# Names of this module, so that tests and scripts/benchmark_host.py replace the driver without a GPU. The functions of
# torch._C are those behind torch.cuda's, which make sure first that CUDA is initialised: a tensor on a GPU says that.
device_of = Tensor.get_device
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = raw_stream


# Gives the tensors' device, None if there are several; all that Triton and the tuner distinguish launches by; and the
# arguments as numbers.
_Reader: TypeAlias = Callable[
    [tuple[Argument, ...], dict[str, Constant]], tuple[int | None, tuple[object, ...], tuple[int | float, ...]]
]


class _Compiled(NamedTuple):
    """Machine code on one device, and what it is given beside the arguments."""

    run: Callable[..., None]
    function: object
    metadata: object
    # the values of the constants, in the kernel's order
    constants: tuple[Constant, ...]
    # the same by name, for the grid
    options: Mapping[str, int]


class _CompiledByTriton(Protocol):
    run: Callable[..., None]
    function: object
    packed_metadata: object


class Launch(NamedTuple):
    """What was launched, see `recorded`; `size` is the grid, `key` what Triton and the tuner distinguish it by."""

    kernel: Kernel
    device: int
    key: tuple[object, ...]
    size: tuple[int, ...]
    args: tuple[Argument, ...]


class _Here(threading.local):
    """Where launches of this thread are written down."""

    launches: list[Launch] | None = None


_here = _Here()


class Chooser(Protocol):
    """What chooses among a kernel's configurations, see tuning.py."""

    configs: list[triton.Config]
    # the kernel's arguments whose values choose
    keys: list[str]

    def choose(
        self, kernel: Kernel, index: int, grid: Grid, args: tuple[Argument, ...], constants: dict[str, Constant]
    ) -> tuple[triton.Config, bool]: ...


class Kernel:
    """A Triton kernel that is launched as Triton's are, `kernel[grid](*args, CONSTANT=value)`.

    Arguments go by position and constants, whose names are in capitals, by name; a kernel's constants come last.

    Attributes:
        fn: Triton's own kernel.
        configs: The configurations that it is tuned over; none if the caller gives all constants.
        arg_names: Of all arguments and constants.
    """

    def __init__(self, fn: JITFunction, tuner: Chooser | None = None) -> None:
        self.fn, self.tuner, self.arg_names = fn, tuner, list(fn.arg_names)
        self.configs: list[triton.Config] = [] if tuner is None else tuner.configs
        self.__name__, self.__doc__ = fn.__name__, fn.__doc__
        self.constants = [name for name in self.arg_names if name.isupper()]
        arguments = self.arg_names[: len(self.arg_names) - len(self.constants)]
        if self.constants != self.arg_names[len(arguments) :]:
            raise TypeError(f"The constants of kernel {self.__name__} must come last, found {self.arg_names}.")
        # of each argument: whether its value chooses a configuration, and whether Triton distinguishes its values
        keys = [] if tuner is None else tuner.keys
        plain = {parameter.name for parameter in getattr(fn, "params", ()) if parameter.do_not_specialize}
        self._roles = [(name in keys, name not in plain) for name in arguments]
        self._plain = plain - set(keys)
        self._known: dict[tuple[object, ...], _Compiled] = {}
        self._readers: dict[tuple[type, ...], _Reader] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: Grid, *args: Argument, **constants: Constant) -> None:
        """Launch the kernel on the current stream of the device that its tensors lie on.

        Raises:
            ValueError: The tensors lie on different devices.
        """
        kinds = tuple(map(type, args))
        read = self._readers.get(kinds)
        if read is None:
            read = self._readers[kinds] = self._reader(kinds)
        index, key, values = read(args, constants)
        if index is None:
            raise ValueError(self._devices(args))
        # the interpreter runs on the CPU, where there is no device to enter
        if index < 0 or index == current_device():
            self._launch(index, key, values, grid, args, constants)
        else:
            with torch.cuda.device(index):
                self._launch(index, key, values, grid, args, constants)
        if _here.launches is not None and (compiled := self._known.get(key)) is not None:
            size = grid(compiled.options) if callable(grid) else grid
            _here.launches.append(Launch(self, index, key, size, args))

    @contextmanager
    def configured(self, number: int) -> Iterator[None]:
        """In the `with` block the kernel runs in configuration `number` of its own, or in its last; nothing is tuned.

        What was remembered of launches comes back afterwards, as if there had been none.
        """
        known, tuner = self._known, self.tuner
        self._known = {}
        if tuner is not None:
            self.tuner = copy.copy(tuner)
            self.tuner.configs = [self.configs[min(number, len(self.configs) - 1)]]
        try:
            yield
        finally:
            self._known, self.tuner = known, tuner

    def known(self, key: tuple[object, ...]) -> _Compiled | None:
        """The machine code that a launch of this `key` took, None if it is not remembered."""
        return self._known.get(key)

    def takes_any(self, name: str) -> bool:
        """Whether machine code is the same for all values of this argument of 32 bits, and for all others."""
        return name in self._plain

    def _reader(self, kinds: tuple[type, ...]) -> _Reader:
        """A function that reads arguments of these types; written out, since a loop over them takes twice as long.

        Triton compiles for each dtype, for addresses that divide by 16 and others, for whole numbers that are 1, that
        divide by 16 and others, of 32 bits and of 64; `do_not_specialize` leaves but the last. An argument whose value
        chooses a configuration tells launches apart by the value.
        """
        if len(kinds) != len(self._roles):
            raise TypeError(f"Kernel {self.__name__} takes {len(self._roles)} arguments, found {len(kinds)}.")
        # not the kernel's names, which may be those of this function
        names = [f"a{number}" for number in range(len(kinds))]
        tensors = [name for name, kind in zip(names, kinds, strict=True) if issubclass(kind, Tensor)]
        if not tensors:
            raise TypeError(f"Kernel {self.__name__} was given no tensor.")
        facts = []
        for name, kind, (chooses, special) in zip(names, kinds, self._roles, strict=True):
            if name in tensors:
                facts += [f"{name}.dtype", f"{name}_at % 16 == 0"]
            elif kind is int:
                facts.append(
                    name if chooses else f"_kind({name})" if special else f"-2147483648 <= {name} < 2147483648"
                )
        others = " or ".join(f"device_of({name}) != index" for name in tensors[1:])
        source = "\n    ".join(
            [
                "def read(args, constants, kinds=kinds):",
                f"{', '.join(names)}, = args",
                *(f"{name}_at = {name}.data_ptr()" for name in tensors),
                f"index = device_of({tensors[0]})",
                *([f"if {others}: return None, (), ()"] if others else []),
                f"key = (index, kinds, *constants.items(), {', '.join(facts)})",
                f"return index, key, ({', '.join(f'{name}_at' if name in tensors else name for name in names)},)",
            ]
        )
        local: dict[str, object] = {"kinds": kinds}
        exec(source, globals(), local)
        return cast(_Reader, local["read"])

    def _devices(self, args: tuple[Argument, ...]) -> str:
        found = ", ".join(
            f"{name} on {value.device}"
            for name, value in zip(self.arg_names, args, strict=False)
            if isinstance(value, Tensor)
        )
        return f"The tensors of kernel {self.__name__} must lie on one device, found {found}."

    def _launch(
        self,
        index: int,
        key: tuple[object, ...],
        values: tuple[int | float, ...],
        grid: Grid,
        args: tuple[Argument, ...],
        constants: dict[str, Constant],
    ) -> None:
        """Launch on the current device."""
        compiled = self._known.get(key)
        if compiled is None or self.fn.pre_run_hooks or watched():
            self._launch_first(index, key, grid, args, constants)
            return
        run, function, metadata, others, options = compiled
        size = grid(options) if callable(grid) else grid
        x, y, z = size if len(size) == 3 else (*size, 1, 1)[:3]
        run(x, y, z, current_stream(index), function, metadata, None, None, None, *values, *others)

    def _launch_first(
        self,
        index: int,
        key: tuple[object, ...],
        grid: Grid,
        args: tuple[Argument, ...],
        constants: dict[str, Constant],
    ) -> None:
        """Launch by Triton's own call, which compiles if it has to, and remember what it took."""
        options, lasts = constants, True
        if self.tuner is not None:
            config, lasts = self.tuner.choose(self, index, grid, args, constants)
            options = {**constants, **config.all_kwargs()}
        compiled = self.by_triton(grid, args, options)
        # in the interpreter there is nothing compiled
        if _DIRECT and lasts and compiled is not None:
            named = cast(Mapping[str, int], options)
            others = tuple(options[name] for name in self.constants) if _TAKES_CONSTANTS else ()
            self._known[key] = _Compiled(compiled.run, compiled.function, compiled.packed_metadata, others, named)

    def by_triton(
        self, grid: Grid, args: tuple[Argument, ...], options: dict[str, Constant]
    ) -> _CompiledByTriton | None:
        """Launch on the current device by Triton's own call; what was compiled, None in the interpreter."""
        size = grid(cast(Mapping[str, int], options)) if callable(grid) else grid
        return cast("_CompiledByTriton | None", self.fn.run(*args, grid=size, warmup=False, **options))


@lru_cache(maxsize=4096)
def _kind(value: int) -> tuple[bool, bool, bool]:
    """What Triton distinguishes of a whole number."""
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """In the `with` block launches of this thread are written down, if their machine code is remembered."""
    before, _here.launches = _here.launches, []
    try:
        yield _here.launches
    finally:
        _here.launches = before


def watched() -> bool:
    """Whether a profiler wants to be called at each launch, which Triton's own call does."""
    hook = hooks.launch_enter_hook
    # from 3.5 on always a list of hooks, which may be empty
    return hook is not None and bool(getattr(hook, "calls", True))


hooks = triton.knobs.runtime if _VERSION >= (3, 4) else triton.compiler.CompiledKernel
