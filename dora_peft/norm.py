"""When v = ||W0 + s B A|| is refreshed.

v depends on A, B, s and W0 only, so it needs one refresh per optimizer step, whatever the number of forward passes. It
is kept per layer and adapter beside a key of everything that it was computed from: a forward pass compares the key and
recomputes v where it differs. The key holds

    - identity, storage address, version counter, dtype and device of A, B and W0: in-place edits, loads, moves, casts,
      merges;
    - the scaling: rescaling an adapter;
    - the number of optimizer steps in this process: optimizers that write through raw pointers or `.data`
      (bitsandbytes) leave the version counters alone, but run the optimizer-step hooks.

What none of these sees is a write through `.data` outside an optimizer: call `refresh(model)` after it. `checking()`
finds such writes by recomputing v at every use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from . import functional

if TYPE_CHECKING:
    from .layer import DoraLayer

# A number for every tensor that was seen: addresses alone are reused.
_numbers = WeakIdKeyDictionary()
_count = itertools.count()
_optimizer_steps = 0
_checking = False


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


@dataclass
class Cached:
    """A value beside the key of what it was computed from. The key means nothing in a copy or another process."""

    value: Tensor | None = None
    key: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "key": None}


@dataclass
class Norm(Cached):
    """v and what belongs to it, for one adapter of one layer.

    Attributes:
        value: v [out], fp32 (fp64 for an fp64 base), floored where it vanishes over a non-zero row of W0.
        tied: Rows whose magnitude follows their norm [out, bool], None where there are none.
        settled: False until `tied` is known: from creation, or at the first use after a load.
        key: What `value` was computed from.
    """

    tied: Tensor | None = None
    settled: bool = False


def _identity(tensor: Tensor) -> Any:
    """A value that changes when the tensor's content does, as far as that is visible."""
    if tensor.is_inference():
        return object()  # no version counter: never equal, so always recomputed
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        address = 0
    if tensor not in _numbers:
        _numbers[tensor] = next(_count)
    return _numbers[tensor], address, tensor._version, tensor.dtype, tensor.device, tuple(tensor.shape)


def base_squared(layer: DoraLayer) -> Tensor:
    """||W0||^2 per output row [out]; computed once, again only after W0 changed."""
    weight = layer.original_weight()
    key = _identity(weight) if isinstance(weight, Tensor) else id(weight)
    cached = layer._base_norm
    if cached.value is None or cached.key != key:
        cached.value, cached.key = layer.base_weight().row_norms_squared(), key
    return cached.value


def _compute(layer: DoraLayer, adapter: str) -> Tensor:
    squared = base_squared(layer)
    lora_A, lora_B = layer.factors(adapter)
    if layer.magnitude_only[adapter]:
        norm = squared.sqrt()
    else:
        norm = functional.norm_squared(
            layer.base_weight(),
            squared,
            lora_A.detach().to(squared.dtype),
            lora_B.detach().to(squared.dtype),
            float(layer.scaling[adapter]),
        )
        norm = norm.clamp_(min=0).sqrt_()
    return norm


def weight_norm(layer: DoraLayer, adapter: str) -> Norm:
    """The up-to-date norm of an adapter, refreshed where something it depends on changed. No gradient."""
    norm = layer._norms.setdefault(adapter, Norm())
    lora_A, lora_B = layer.factor_parameters(adapter)
    weight = layer.original_weight()
    key = (
        _optimizer_steps,
        float(layer.scaling[adapter]),
        _identity(lora_A),
        _identity(lora_B),
        _identity(weight) if isinstance(weight, Tensor) else id(weight),
    )
    if norm.key == key and not _checking:
        return norm
    # autocast would lower the products' precision; tensors made in inference mode cannot be used in training later
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(lora_A.device.type, enabled=False):
        value = _compute(layer, adapter)
        magnitude = layer.magnitude(adapter)
        if not norm.settled:
            # after a load: a zero row of W0 whose magnitude is its norm was tied when it was saved
            flat = magnitude.detach().flatten().to(value.dtype)
            norm.tied = _or_none((base_squared(layer) == 0) & torch.isclose(flat, value, rtol=1e-4, atol=0))
            norm.settled = True
        if norm.tied is not None:
            norm.tied = norm.tied.to(value.device)
            # not through the version counter: a forward pass may run between a backward pass and its optimizer step
            magnitude.data.view(-1)[norm.tied] = value[norm.tied].to(magnitude.dtype)
        value = torch.maximum(value, functional.floor(base_squared(layer)))
        if _checking and norm.key == key and norm.value is not None and not torch.equal(norm.value, value):
            worst = ((norm.value - value).abs() / value).max().item()
            raise RuntimeError(
                f"Stale weight norm in module '{layer.name}', adapter '{adapter}': off by {worst:.1e} (relative). A, B "
                "or the base weight was changed through `.data` outside an optimizer; call dora_peft.refresh(model) "
                "after it."
            )
    norm.value, norm.key = value, key
    return norm


def initial(layer: DoraLayer, adapter: str) -> Tensor:
    """m at creation: ||W0 + s B A||, [out]. Rows where it is 0 are tied from now on."""
    with torch.inference_mode(False), torch.no_grad():
        device = layer.factor_parameters(adapter)[0].device.type
        with torch.autocast(device, enabled=False):
            value = _compute(layer, adapter)
    layer._norms[adapter] = Norm(tied=_or_none(value == 0), settled=True)
    return value


def _or_none(mask: Tensor) -> Tensor | None:
    return mask if bool(mask.any()) else None


def refresh(model: nn.Module) -> None:
    """Forget every cached norm of the model's DoRA layers, so that the next use recomputes it.

    Needed only after A, B or a base weight was written through `.data` outside an optimizer.
    """
    module: Any
    for module in model.modules():
        norms = getattr(module, "_norms", None)
        if isinstance(norms, dict):
            module._base_norm.key = None
            for norm in norms.values():
                norm.key = None


@contextmanager
def checking() -> Iterator[None]:
    """Recompute v at every use and raise a RuntimeError that names the module where a cached one is stale."""
    global _checking
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before
