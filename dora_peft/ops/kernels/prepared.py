"""Launches that are looked up once: from the second call on, arguments of the same layout go straight to the driver.

`Kernel.launch` finds out at each launch what Triton distinguishes of each argument, and its callers what their grid,
strides and block counts are: 8 to 14 us of Python, five to eight times a layer. All of it follows from shapes, strides
and dtypes. Whoever knows that these are the same as last time keeps a `Prepared`, see plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from . import launch
from .launch import Argument, Constant, Launch

# 32 bits with a sign, which Triton takes whole numbers of by default.
_LEAST, _MOST = -(2**31), 2**31 - 1


class Prepared:
    """What `launcher` launches, for arguments of one layout.

    Each call is `prepared.call(*args)`, an attribute that changes once it is known what to launch. Nothing is prepared
    in the interpreter, amid a capture before kernels are tuned, for memory that begins at no multiple of 16 bytes, and
    as long as a profiler watches launches: `launcher` is called then.

    Args:
        launcher: Launches one kernel, given tensors or None, and numbers.
        varying: For each number among its arguments, by position: which argument of the kernel it is, whose value may
            differ from call to call. All others have to be the same, and so has what Triton, the kernel's tuner and
            its grid ask of tensors: device, dtype, shape and strides.
    """

    __slots__ = ("_launcher", "_varying", "call")

    def __init__(self, launcher: Callable[..., None], varying: Mapping[int, str] | None = None) -> None:
        self._launcher, self._varying = launcher, varying or {}
        self.call: Callable[..., None] = self._first

    def _first(self, *args: Argument | None) -> None:
        with launch.recorded() as launches:
            self._launcher(*args)
        if len(launches) == 1:
            direct = self._direct(launches[0], args)
            if direct is not None:
                self.call = direct

    def _direct(self, done: Launch, args: tuple[Argument | None, ...]) -> Callable[..., None] | None:
        """What launches the same for other arguments, None if that cannot be said yet."""
        kernel, compiled = done.kernel, done.kernel.known(done.key)
        tensors = {number: arg for number, arg in enumerate(args) if isinstance(arg, Tensor)}
        if compiled is None or any(tensor.data_ptr() % 16 for tensor in tensors.values()):
            return None
        varying = {name: number for number, name in self._varying.items()}
        places: list[str] = []
        fixed: list[Constant] = []
        for name, value in zip(kernel.arg_names, done.args, strict=False):
            if name in varying:
                places.append(f"a{varying[name]}")
                continue
            # memory of no elements is at address 0
            if isinstance(value, Tensor) and value.numel():
                found = _place(value, tensors)
                if found is None:
                    return None
                places.append(f"p{found[0]}" + (f" + {found[1]}" if found[1] else ""))
            else:
                places.append(f"f{len(fixed)}")
                fixed.append(0 if isinstance(value, Tensor) else value)
        for number in compiled.constants:
            places.append(f"f{len(fixed)}")
            fixed.append(number)
        whole = tuple(number for number in self._varying if isinstance(args[number], int))
        if any(not kernel.takes_any(self._varying[number]) for number in whole):
            raise TypeError(f"Kernel {kernel.__name__} is compiled for some values of {self._varying}.")
        wide = tuple(not _LEAST <= cast(int, args[number]) <= _MOST for number in whole)
        make = _maker(len(args), tuple(sorted(tensors)), whole, wide, tuple(places), len(fixed))
        size = done.size
        x, y, z = size if len(size) == 3 else (*size, 1, 1)[:3]
        return make(
            launch, kernel, kernel._known, self._launcher, done.device, compiled.run, compiled.function,
            compiled.metadata, x, y, z, *fixed,
        )  # fmt: skip


def _place(value: Tensor, tensors: dict[int, Tensor]) -> tuple[int, int] | None:
    """Of which argument `value` is or is a part, and at which byte it begins there; None if that is not certain."""
    for number, tensor in tensors.items():
        if tensor is value:
            return number, 0
    first, last = value.data_ptr(), value.data_ptr() + value.nbytes
    # several may be parts of one storage, such as a sharder's
    found = [n for n, t in tensors.items() if t.data_ptr() <= first and last <= t.data_ptr() + _extent(t)]
    offset = first - tensors[found[0]].data_ptr() if len(found) == 1 else -1
    return None if offset < 0 or offset % 16 else (found[0], offset)


def _extent(tensor: Tensor) -> int:
    """How many bytes lie between the first element of a tensor and behind its last one."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize


@lru_cache(maxsize=256)
def _maker(
    count: int,
    tensors: tuple[int, ...],
    whole: tuple[int, ...],
    wide: tuple[bool, ...],
    places: tuple[str, ...],
    fixed: int,
) -> Callable[..., Callable[..., None]]:
    """A function that makes a direct launch; written out, since loops over the arguments take several times as long.

    Args:
        count: Arguments of the launch.
        tensors, whole: Which of them are tensors, and which are whole numbers.
        wide: Whether those take more than 32 bits.
        places: Of the kernel's arguments in terms of these and of `fixed` values.
    """
    args = ", ".join(f"a{number}" for number in range(count))
    numbers = [
        f"{'' if more else 'not '}{_LEAST} <= a{number} <= {_MOST}" for number, more in zip(whole, wide, strict=True)
    ]
    otherwise = [
        f"({' | '.join(f'p{number}' for number in tensors)}) & 15",
        *numbers,
        "launch.current_device() != index",
        # `configured`, or a kernel's machine code was forgotten
        "kernel._known is not known",
        "kernel.fn.pre_run_hooks",
        "(hook := hooks.launch_enter_hook) is not None and getattr(hook, 'calls', True)",
    ]
    source = "\n".join(
        [
            "def make(launch, kernel, known, launcher, index, run, function, metadata, x, y, z, "
            f"{', '.join(f'f{number}' for number in range(fixed))}):",
            "    hooks = launch.hooks",
            f"    def call({args}):",
            *(f"        p{number} = a{number}.data_ptr()" for number in tensors),
            f"        if {' or '.join(otherwise)}:",
            f"            launcher({args})",
            "            return",
            "        run(x, y, z, launch.current_stream(index), function, metadata, None, None, None, "
            f"{', '.join(places)})",
            "    return call",
        ]
    )
    local: dict[str, Callable[..., Callable[..., None]]] = {}
    exec(source, {"torch": torch}, local)
    return local["make"]
