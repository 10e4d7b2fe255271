"""Base weights that accelerate keeps elsewhere (device_map, cpu_offload, disk_offload), and adapters that stay here.

Between calls such a weight is on the meta device; an AlignDevicesHook brings it in around the forward pass of its
module. Whoever reads it outside of that does so inside `at_hand`. The tensors of an adapter are read without a call of
their modules, and are small: they stay on the execution device whatever becomes of their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook, ModelHook

_RESIDENT = "_dora_peft_resident"


def hook_of(layer: nn.Module) -> AlignDevicesHook | None:
    """The hook that keeps a module's weights elsewhere between calls, None if there is none."""
    hook = layer.__dict__.get("_hf_hook")
    if hook is None:
        return None
    from accelerate.hooks import AlignDevicesHook

    # a SequentialHook holds others
    for one in (*getattr(hook, "hooks", ()), hook):
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def is_away(layer: nn.Module) -> bool:
    """Whether a hook would have to bring the module's weights in."""
    return hook_of(layer) is not None and any(p is not None and p.is_meta for p in layer._parameters.values())


def execution_device(layer: nn.Module) -> torch.device:
    """Where the hook brings the weights, the CPU if it does not say or there is none."""
    device = getattr(hook_of(layer), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def read(layer: nn.Module, name: str) -> Tensor:
    """One tensor of a module, brought in alone if a hook keeps it elsewhere."""
    tensor, hook = cast(Tensor, getattr(layer, name)), hook_of(layer)
    if not tensor.is_meta or hook is None:
        return tensor
    return hook.weights_map[name].to(execution_device(layer))


def at_hand(layer: nn.Module) -> AbstractContextManager[None]:
    """Have a base layer's weights here; nothing happens if no hook keeps them elsewhere, or they are here already.

    What was made of the weights inside stays valid afterwards; the parameters themselves are on the meta device again.

    Args:
        layer: The base layer itself, as `get_base_layer()` gives it.
    """
    hook = hook_of(layer)
    return nullcontext() if hook is None or not is_away(layer) else _brought_in(layer, hook)


@contextmanager
def _brought_in(layer: nn.Module, hook: AlignDevicesHook) -> Iterator[None]:
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


def keep_resident(module: nn.Module) -> None:
    """Have accelerate leave this module's tensors on the execution device from now on."""
    setattr(module, _RESIDENT, True)


def staying_add_hook(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """accelerate.hooks.add_hook_to_module, but for modules that stay: these are moved once, and get no hook."""

    def add_hook_to_module(module: nn.Module, hook: ModelHook, *args: object, **kwargs: object) -> nn.Module:
        if not getattr(module, _RESIDENT, False) or not hasattr(hook, "execution_device"):
            return original(module, hook, *args, **kwargs)
        device, weights = getattr(hook, "execution_device", None), getattr(hook, "weights_map", None)
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                value = parameter.data
                if parameter.is_meta and weights is not None and owner is module and name in weights:
                    value = weights[name]
                if device is not None and not value.is_meta:
                    value = value.to(device, parameter.dtype)
                if parameter.is_meta and not value.is_meta:
                    owner._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                else:
                    parameter.data = value
        return module

    return add_hook_to_module
