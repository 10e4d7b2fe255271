"""m as a module, and what is said if somebody has cast it."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.constants import LOW_PRECISION


class Magnitude(nn.Module):
    """m of one adapter as a module with `.weight`, the form that FSDP's wrap policy and checkpoint loaders expect.

    `.half()` and `.to(torch.bfloat16)` move it but leave its dtype: in bf16 a whole run changes m by less than one
    rounding step.
    """

    instances: ClassVar[weakref.WeakSet[Magnitude]] = weakref.WeakSet()
    # a low precision that was asked for by name
    asked: torch.dtype | None = None

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)
        self.instances.add(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        # copied or unpickled
        self.instances.add(self)

    @classmethod
    def all(cls) -> list[Magnitude]:
        """Every one there is."""
        while True:
            try:
                return list(cls.instances)
            except RuntimeError:
                # another thread has just made or copied a model
                continue

    def forward(self) -> Tensor:
        """m as stored; called only where a hook or a mask is on this module, see called.py."""
        return self.weight

    def cast(self, dtype: torch.dtype) -> None:
        """Change the dtype, low precision included: on explicit request only."""
        self.asked = dtype
        if self.weight.dtype == dtype:
            return
        self.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=self.weight.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Magnitude:
        def keep_precision(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if new.dtype in LOW_PRECISION else new

        return super()._apply(keep_precision, recurse)


def warn_about_low_precision(holder: Magnitude, name: str, notices: set[str]) -> None:
    """Say once per model that its magnitudes are in bf16 or fp16 without anyone having asked for it.

    Args:
        holder: A magnitude that is about to be used in training.
        name: Its layer's, for the message.
        notices: What has been said about the model already.
    """
    magnitude = holder.weight
    if magnitude.dtype not in LOW_PRECISION or "low precision" in notices or magnitude.dtype == holder.asked:
        return
    if not magnitude.requires_grad:
        return
    notices.add("low precision")
    if _is_gathered(magnitude):
        return
    warnings.warn(
        f"The magnitude of module '{name}' is in {magnitude.dtype}, where a step of an optimizer is below one "
        "rounding step: it will not be trained (of 1,152 such magnitudes none moved in 20 steps of AdamW). It was made "
        "in float32 and cast from outside, as some trainers do to all parameters of a quantised model. Before the "
        "optimizer is created, call .float() on every dora_peft.layers.magnitude.Magnitude in model.modules(), or ask "
        "for the low precision with autocast_adapter_dtype=False.",
        stacklevel=2,
    )


def _is_gathered(parameter: Tensor) -> bool:
    """Whether it is FSDP2's low precision copy, for one forward pass, of an fp32 parameter that is the trained one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    owners = gc.get_referrers(parameter)
    return any(type(o).__name__ == "FSDPParam" or (isinstance(o, dict) and "_unsharded_param" in o) for o in owners)
