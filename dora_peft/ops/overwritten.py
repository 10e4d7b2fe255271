"""Layers whose outputs other code overwrites before their backward pass: which they are, what is said, what is done."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .torch_names import after_backward

ACTIONS = ("recompute", "copy")
# What `on_overwritten_output` has chosen; written by it alone.
chosen = "recompute"
# After which of a layer's backward passes the host asks what a device found: the first ones, and every so many.
_FIRST, _EVERY = 4, 16


# A function to its users, as choice.implementation is.
class on_overwritten_output:
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
        global chosen
        if action not in ACTIONS:
            raise ValueError(f"on_overwritten_output must be one of {', '.join(ACTIONS)}, found {action!r}.")
        self._before, chosen = chosen, action

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global chosen
        chosen = self._before


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
            after_backward(self.warn)

    def warn(self) -> None:
        """Name the modules in one warning."""
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
        self.pending: _Later | None = None
        self._passes = 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "pending": None}

    def notice(self) -> None:
        """An output was found overwritten by something that moves no version counter."""
        if not self.overwritten and self.name is not None:
            self.overwritten = True
            if self.report is not None:
                self.report.add(self.name)

    def announce(self) -> None:
        """In a backward pass: have what was noticed be said."""
        if self.report is not None:
            self.report.announce()

    def asks(self) -> bool:
        """Whether this backward pass is one after which the host learns what the device found: the first ones, and then
        some. Gradients are right in each; to be told costs a copy and an event, 20 us of Python a layer."""
        self._passes += 1
        return self._passes <= _FIRST or self._passes % _EVERY == 0

    def notice_later(self, gone: Tensor) -> None:
        """The same if `gone` [1], on a device, is not 0: learned at a later forward pass, without waiting."""
        if not self.overwritten and self.name is not None and self.pending is None:
            self.pending = _Later.of(gone)

    def learn(self) -> None:
        """What has arrived from the device since."""
        if self.pending is not None and self.pending.has_arrived():
            pending, self.pending = self.pending, None
            if pending.value():
                self.notice()


class _Later:
    """A number on its way from a device."""

    def __init__(self, host: Tensor, event: torch.cuda.Event | None) -> None:
        self.host, self.event = host, event

    @classmethod
    def of(cls, number: Tensor) -> _Later | None:
        if number.device.type != "cuda":
            return cls(number, None)
        if torch.cuda.is_current_stream_capturing():
            # a replay would write there without us
            return None
        host = torch.empty(1, dtype=number.dtype, pin_memory=True)
        host.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(number.device))
        return cls(host, event)

    def has_arrived(self) -> bool:
        if self.event is None:
            return True
        # during a capture CUDA refuses to be asked, and gives the capture up
        return not torch.cuda.is_current_stream_capturing() and self.event.query()

    def value(self) -> int:
        # read from memory: an operation of torch's would wait
        return int(self.host.numpy()[0])
