"""A layer's own output y, kept for its backward pass, and what tells that it still is what the layer wrote.

The magnitude's gradient is sum_n g (y - b) / m, and the next operation often keeps y anyway, so that keeping it costs
nothing. But y is not ours alone: a consumer may change it in place, which its version counter tells, and a fused kernel
may write over it by raw pointer, which nothing tells (Liger's SwiGLU writes its gradients there, its RoPE rotates q and
k). So y is believed only if its content is what was written:

    - its version counter has not moved;
    - the incoming gradient does not share its memory;
    - some whole rows, and one element of nearly every token along a diagonal (of 4,096 tokens, where there are more),
      from places drawn anew each time, hold the bits that the forward pass copied from there. Whole rows see a kernel
      that writes some columns of all tokens, the diagonal one that writes all columns of some tokens. What writes
      neither (a few columns of a few tokens, one token at an end) may go unseen.

If it is not, the layer computes z = (y - b) / c again, in that very backward pass. From then on it keeps a copy of its
own or computes z again each time, as `on_overwritten_output` says. What is saved for backward has the same number,
order, shapes and dtypes in every case: checkpointing, which runs the forward pass twice, counts them.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from . import choice
from .content import same_bits

ACTIONS = ("recompute", "copy")
_action = "recompute"
# Not torch's or Python's global generators, whose numbers belong to the user.
_random = random.Random()
# Elements of y that are kept as whole rows, but at least so many rows, and along the diagonal: 1 % of y at 512 tokens
# of 512 features.
_ROWS, _FEWEST, _DIAGONAL = 2048, 4, 4096


class on_overwritten_output:  # a function to its users, as choice.implementation is
    """Choose what a layer does whose output other code overwrites before the backward pass needs it.

        dora_peft.on_overwritten_output("copy")
        with dora_peft.on_overwritten_output("recompute"):
            ...

    Args:
        action: "recompute" (the default) computes the output again in each backward pass: one product with the base
            weight. "copy" keeps a copy from the forward pass on: [tokens, out_features] numbers of the output's dtype.

    Raises:
        ValueError: Another action.

    Gradients are the same. It concerns only layers whose outputs were found overwritten, of which a warning names the
    modules; the choice is a property of the process, never of a checkpoint.
    """

    def __init__(self, action: str) -> None:
        global _action
        if action not in ACTIONS:
            raise ValueError(f"on_overwritten_output must be one of {', '.join(ACTIONS)}, found {action!r}.")
        self._before, _action = _action, action

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        global _action
        _action = self._before


class Report:
    """The modules of one model whose outputs are overwritten: one warning names them, after the backward pass."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.announced = False

    def add(self, name: str) -> None:
        """Name one more module; called in a backward pass, or in a forward pass that learns of an earlier one."""
        self.names.append(name)

    def announce(self) -> None:
        """Warn when this backward pass ends, and with it the other layers have looked as well."""
        if self.names and not self.announced:
            self.announced = True
            Variable._execution_engine.queue_callback(self.warn)

    def warn(self) -> None:
        shown = ", ".join(self.names[:8]) + (f" and {len(self.names) - 8} more" if len(self.names) > 8 else "")
        warnings.warn(
            "Other code overwrites the outputs of DoRA modules before their backward pass (fused kernels such as "
            f"Liger's do): {shown}. Their gradients are right; from now on these modules compute their outputs again "
            "in each backward pass, one product with the base weight each. "
            'dora_peft.on_overwritten_output("copy") keeps a copy instead, [tokens, out_features] numbers each.',
            UserWarning,
            stacklevel=2,
        )


class Outputs:
    """What is known about the outputs of one layer.

    Attributes:
        name: The module's, None for a layer of no model.
        overwritten: Whether one was found overwritten.
    """

    def __init__(self, name: str | None = None, report: Report | None = None) -> None:
        self.name, self.report, self.overwritten = name, report, False
        self._pending: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}

    def notice(self) -> None:
        """An output was found overwritten by something that no version counter tells of."""
        if not self.overwritten and self.name is not None:
            self.overwritten = True
            if self.report is not None:
                self.report.add(self.name)

    def announce(self) -> None:
        """In a backward pass: have what was noticed be said."""
        if self.report is not None:
            self.report.announce()

    def notice_later(self, gone: Tensor) -> None:
        """The same if `gone` [1], on a device, is not 0: learned at a later forward pass, without waiting."""
        if not self.overwritten and self.name is not None and self._pending is None:
            self._pending = _Later.of(gone)

    def learn(self) -> None:
        """What has arrived from the device since."""
        if self._pending is not None and self._pending.has_arrived():
            pending, self._pending = self._pending, None
            if pending.value():
                self.notice()


class _Later:
    """A number on its way from a device."""

    def __init__(self, host: Tensor, event: Any) -> None:
        self.host, self.event = host, event

    @classmethod
    def of(cls, number: Tensor) -> _Later | None:
        if number.device.type != "cuda":
            return cls(number, None)
        if torch.cuda.is_current_stream_capturing():
            return None  # a replay would write there without us
        host = torch.empty(1, dtype=number.dtype, pin_memory=True)
        host.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(number.device))
        return cls(host, event)

    def has_arrived(self) -> bool:
        return self.event is None or self.event.query()

    def value(self) -> int:
        return int(self.host.numpy()[0])  # read from memory: no operation of torch's, which would wait


class KeptOutput:
    """One output y [..., out], from the forward pass to the backward pass of its layer."""

    def __init__(self, outputs: Outputs, on_device: bool) -> None:
        self.outputs, self.on_device = outputs, on_device
        self.alias: Tensor | None = None
        self.version: int | None = None
        self.places: tuple[int, int] | None = None
        self.through_hooks = saved_tensor_hooks_active()

    @classmethod
    def of(cls, y: Tensor, outputs: Outputs, *, on_device: bool = False) -> tuple[KeptOutput, list[Tensor]]:
        """Keep an output.

        Args:
            y: The output, just written.
            outputs: What is known about the layer.
            on_device: Leave the comparison to the device, see `read`.

        Returns:
            What to call `read` of, and the tensors to save for backward and to give to it: rows [k, out] and a diagonal
            [d] of y; under saved-tensor hooks (checkpointing, offloading) also the places [2] of these, and y.
        """
        outputs.learn()
        self = cls(outputs, on_device)
        kept, ordered = y, in_memory_order(y)
        if not outputs.overwritten and ordered is not None:
            self.version = version(y)
        elif _action == "copy" and ordered is not None:
            kept = y.clone()
        else:
            # NaN, which no sample matches: a checkpoint may give it to the graph of a pass that did keep y
            kept = y.new_full((), torch.nan).expand(y.shape)
        ordered = y.contiguous() if ordered is None else ordered
        places = _places(ordered)
        saved = list(_copied(ordered, places)) if on_device else [part.clone() for part in _parts(ordered, *places)]
        # An alias, since y on its own graph node would be a reference cycle.
        self.alias = kept.detach()
        if self.through_hooks:
            # y has to go through the hooks, which switch off torch's own check for changes in place; the alias keeps
            # y's version counter and lets go of its storage. The places too: those of the pass that is run again.
            self.alias.data = y.new_empty(0)
            saved += [torch.tensor(places, device="cpu"), kept]  # read without waiting
        else:
            self.places = places
        return self, saved

    def read(self, saved: list[Tensor], grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What was kept, if it still is what the layer wrote.

        Args:
            saved: The tensors of `saved`, unpacked.
            grad: dL/dy.

        Returns:
            y, or None where it is known to be overwritten; and where the device compares, a number [1] there that is
            not 0 if y turns out to be overwritten, else None.
        """
        self.outputs.announce()
        rows, diagonal, *through_hooks = saved
        alias, y = self.alias, self.alias
        places = self.places
        if self.through_hooks:
            first, second = through_hooks[0].tolist()
            places, y = (first, second), through_hooks[1]
        else:
            self.alias = None  # lets go of y as the saved tensors are; a second pass over the graph computes it again
        if alias is None or y is None or places is None:
            return None, None
        ordered = in_memory_order(y)
        if ordered is None:
            return None, None  # a stand-in: y was not kept
        if self.version is not None and version(alias) != self.version:
            return None, None  # by an operation of torch's in place, which tells each time
        shared = _share_memory(y, grad)
        if self.on_device:
            gone = _compared(ordered, rows, diagonal, places)
            self.outputs.notice_later(gone)
            return (None, None) if shared else (y, gone)
        found = _parts(ordered, *places)
        if same_bits(found[0], rows) and same_bits(found[1].contiguous(), diagonal):
            return (None if shared else y), None
        self.outputs.notice()
        self.outputs.announce()
        return None, None


def in_memory_order(y: Tensor) -> Tensor | None:
    """y as a contiguous view of its memory: itself, or one of a layout of images; None for any other."""
    if y.is_contiguous():
        return y
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        return y.permute(0, 2, 3, 1)
    if y.dim() == 5 and y.is_contiguous(memory_format=torch.channels_last_3d):
        return y.permute(0, 2, 3, 4, 1)
    return None


def sample(y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows [k * out] and a diagonal [d] of y, copied by a kernel from the places that `seed` draws.

    For compiled graphs, in which a random number would be a constant anyway.
    """
    return _copied(y, _places(y, random.Random(seed)))


def differs(y: Tensor, rows: Tensor, diagonal: Tensor, seed: int) -> Tensor:
    """A number [1] on the device that is not 0 if y does not hold there what `sample` copied."""
    return _compared(y, rows, diagonal, _places(y, random.Random(seed)))


def _copied(y: Tensor, places: tuple[int, int]) -> tuple[Tensor, Tensor]:
    (length, width), (first, start) = _size(y), places
    count, elements = sample_sizes(length, width)
    step = _diagonal(length, width)[0] if elements else 1
    rows, diagonal = choice.kernels().take_sample(y, first * width, start, step, count * width, elements)
    return rows.view(count, width), diagonal


def _compared(y: Tensor, rows: Tensor, diagonal: Tensor, places: tuple[int, int]) -> Tensor:
    (length, width), (first, start) = _size(y), places
    step = _diagonal(length, width)[0] if diagonal.numel() else 1
    return choice.kernels().compare_sample(y, rows, diagonal, first * width, start, step)


def sample_sizes(length: int, width: int) -> tuple[int, int]:
    """How many rows and how many elements of a diagonal are compared of an output [length, width]."""
    if not length or not width:
        return length, 0
    return _row_count(length, width), _diagonal(length, width)[1]


def _places(y: Tensor, generator: random.Random = _random) -> tuple[int, int]:
    """A random row to start from, and a random element."""
    length, width = _size(y)
    if not length or not width:
        return 0, 0
    step, count = _diagonal(length, width)
    first = int(generator.random() * (length - _row_count(length, width) + 1))
    return first, int(generator.random() * (length * width - (count - 1) * step))


def _parts(y: Tensor, first: int, start: int) -> tuple[Tensor, Tensor]:
    """Rows [k, out] from row `first` on, and a diagonal [d] from element `start` on, as views of y."""
    length, width = _size(y)
    matrix = y.detach().view(length, width)
    if not length or not width:
        return matrix, matrix.view(-1)
    step, count = _diagonal(length, width)
    diagonal = matrix.view(-1)[start : start + (count - 1) * step + 1 : step]
    return matrix.narrow(0, first, _row_count(length, width)), diagonal


def _size(y: Tensor) -> tuple[int, int]:
    width = y.shape[-1]
    return (y.numel() // width if width else 0), width


def _row_count(length: int, width: int) -> int:
    return min(length, max(_FEWEST, _ROWS // width))


def _diagonal(length: int, width: int) -> tuple[int, int]:
    """How far apart its elements are, one column further in each token, and how many they are."""
    step = max(1, length // _DIAGONAL) * width + 1
    return step, max(1, length * width // step)


def _share_memory(y: Tensor, grad: Tensor) -> bool:
    try:
        address = y.untyped_storage().data_ptr()
        return address != 0 and grad.untyped_storage().data_ptr() == address
    except (RuntimeError, NotImplementedError):  # a tensor without storage of its own
        return False


def version(tensor: Tensor | None) -> int | None:
    """The version counter, None for a tensor that has none."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def saved_tensor_hooks_active() -> bool:
    """Whether tensors that are saved for backward pass through hooks: non-reentrant checkpointing, offloading."""
    # No public name tells; without this one the hooks are assumed, which is safe: torch then checks versions itself.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
