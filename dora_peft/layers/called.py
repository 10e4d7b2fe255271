"""When the modules of an adapter have to be called: hooks, masks and parametrisations on A, B, dropout and m.

The fast road reads what the modules hold and never calls them. That is the same only for modules as PEFT makes them, so
the plain road of forward.py calls them, as PEFT's own layers do, wherever one of them has

    hooks                   forward, forward pre-, backward and backward pre-hooks, and those of all modules at once
    a computed weight       torch.nn.utils.parametrize and what is built on it, prune, weight_norm, spectral_norm
    another computation     another class or forward method, a bias, dropout that is switched apart from its layer

v belongs to the weights as the call has left them: hooks see one call a pass, and what they change of an output changes
the output alone. The factors of an embedding are parameters, which nobody calls: only their computed values are asked
for. The key of a shortcut asks the same (shortcut.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..bases.inspection import has_global_hooks
from .magnitude import Magnitude

# The forward methods of what PEFT makes A and B of, and dropout.
_FACTORS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_DROPOUT = (nn.Dropout.forward, nn.Identity.forward)
# Forward pre-hooks that write the weight of their module before each call.
_WRITERS = (BasePruningMethod, WeightNorm, SpectralNorm)


class CalledLayer(Protocol):
    """What this file uses of an adapted layer.

    Attributes:
        training: As of nn.Module.
    """

    @property
    def training(self) -> bool: ...
    @property
    def lora_dropout(self) -> nn.ModuleDict: ...
    @property
    def lora_magnitude_vector(self) -> nn.ModuleDict: ...

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]:
        """What holds A and B."""

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...


def has_to_call(layer: CalledLayer, adapter: str) -> bool:
    """Whether this adapter's modules have to be called in a forward pass, instead of reading what they hold."""
    modules = layer.factor_modules(adapter), layer.lora_magnitude_vector[adapter], layer.lora_dropout[adapter]
    return are_called(*modules, layer.training)


def are_called(factors: tuple[nn.Module, nn.Module], holder: nn.Module, dropout: nn.Module, training: bool) -> bool:
    """`has_to_call` of what holds A and B, of m's module, of dropout, and of the mode that their layer is in."""
    if _is_watched(holder) or (isinstance(holder, Magnitude) and type(holder).forward is not Magnitude.forward):
        return True
    if isinstance(factors[0], nn.ParameterDict):
        return any(is_computed(module) for module in factors)
    if has_global_hooks():
        return True
    for module in factors:
        if type(module).forward not in _FACTORS or _is_watched(module) or module._parameters.get("bias") is not None:
            return True
    if type(dropout).forward not in _DROPOUT or _is_watched(dropout):
        return True
    return dropout.training is not training and isinstance(dropout, nn.Dropout)


def _is_watched(module: nn.Module) -> bool:
    """Whether there is more to a call of this module than the forward method of its class."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ or "parametrizations" in module._modules


def is_computed(module: nn.Module) -> bool:
    """Whether what a module holds as its weight is computed from other tensors."""
    return "parametrizations" in module._modules or any(_writers(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks of the user's, apart from those that compute its weight."""
    return bool(module._forward_hooks) or len(_writers(module)) < len(module._forward_pre_hooks)


def _writers(module: nn.Module) -> list[object]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WRITERS)]


def write_weights(*modules: nn.Module) -> None:
    """Have the hooks of these modules that compute a weight compute it now, as a call would.

    Until then the weight is that of the last call, or of the mask as it was set: an optimizer's step changes it no
    more than a loaded checkpoint does.
    """
    for module in modules:
        for hook in _writers(module):
            cast(BasePruningMethod, hook)(module, ())


def computed_once(calls: bool) -> AbstractContextManager[None]:
    """Have parametrised weights computed once for as long as this is open, so that v is that of the product.

    Args:
        calls: Nothing happens if not.
    """
    # a compiler cannot follow: there each use computes, and a weight that iterates (spectral_norm) is one step further
    return parametrize.cached() if calls and not torch.compiler.is_compiling() else nullcontext()


def as_input(layer: CalledLayer, adapter: str, x: Tensor) -> Tensor:
    """x [..., in] as PEFT's LoRA layers give it to dropout and A: in the dtype of A's weight."""
    lora_A = layer.factor_modules(adapter)[0]
    if isinstance(lora_A, nn.ParameterDict):
        return x
    # whatever its weight is computed from: that of the last call may be a tensor of a graph that is gone
    stored = next(lora_A.parameters(), None)
    return x if stored is None else layer._cast_input_dtype(x, stored.dtype)


def branch(layer: CalledLayer, adapter: str, x: Tensor) -> Tensor:
    """B(A(x)) by calling both modules."""
    lora_A, lora_B = layer.factor_modules(adapter)
    return lora_B(lora_A(x))


def magnitude(layer: CalledLayer, adapter: str) -> Tensor:
    """m as stored, as a call of its module gives it."""
    return layer.lora_magnitude_vector[adapter]()
