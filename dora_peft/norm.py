"""When v = ||W0 + s B A|| is refreshed.

v depends on A, B, s and W0 only, so it needs one refresh per optimizer step, whatever the number of forward passes. It
lives in a buffer per layer and adapter that forward, compiled or not, only reads. It is written

    - after an optimizer step on A or B, of which a hook tells that every torch optimizer runs, also those that write
      through raw pointers or `.data` (bitsandbytes): in the next forward pass on a CPU, in the hook itself on a GPU and
      once anything was compiled;
    - on load_state_dict, `.to()` and its kin, and when an adapter is rescaled;
    - in the next eager forward pass after anything else that changes identity, storage address or version counter of
      A, B or W0 (edits by hand, merges, sharding), or the scaling; and after any optimizer step for adapters that no
      optimizer holds directly (DeepSpeed steps on flat copies and writes them back afterwards).

What none of these sees is a write through `.data` outside an optimizer, and a compiled forward does not see edits by
hand: call `refresh(model)` after them. `checking()` finds stale norms by recomputing v at every use.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import choice, functional, linear

# Every adapted layer: what PEFT's or our own classes hold, see layer.DoraLayer for the interface.
_layers: weakref.WeakSet[Any] = weakref.WeakSet()
# What stands for PEFT's own layers while accelerate_use_dora() is on.
views: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_checking = False
# Whether an optimizer step on a CPU leaves the refresh to the next forward pass, which has W0 in its cache and needs
# W0 + s B A anyway. Until something is compiled: a compiled forward pass only reads. On a GPU never: whoever captures a
# forward pass as a CUDA graph replays it without us.
_lazy = True


@dataclass
class Cached:
    """A value beside the key of what it was computed from. The key means nothing in a copy or another process."""

    value: Tensor | None = None
    key: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "key": None}


@dataclass
class BaseNorm(Cached):
    """||W0||^2 per output row, and the smallest v that is divided by."""

    floor: Tensor | None = None


@dataclass
class Norm(Cached):
    """v and what belongs to it, for one adapter of one layer.

    Attributes:
        value: v [out], fp32 (fp64 for an fp64 base), floored where it vanishes over a non-zero row of W0.
        key: What `value` was computed from; None where it has to be computed again.
        tied: Rows whose magnitude follows their norm [out, bool], None where there are none.
        settled: False until `tied` is known: from creation, or at the first use after a load.
        held: An optimizer that holds A, B or m has made a step.
        sharded: A or B was seen as a DTensor: FSDP2 gathers them into another storage for every forward pass, so that
            addresses say nothing.
        stale: An optimizer step changed A or B, and the refresh waits for the next forward pass.
        folded: s c * B [out, r] and c [out] for evaluation, with the magnitude they were computed from.
    """

    tied: Tensor | None = None
    settled: bool = False
    held: bool = False
    sharded: bool = False
    stale: bool = False
    folded: tuple[Tensor, Tensor, Tensor, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "folded": None, "held": False}


def watch(layer: Any) -> None:
    """Refresh the layer's norms from the optimizer hook from now on."""
    _layers.add(layer)


def content(tensor: Any, sharded: bool = False) -> Any:
    """A value that changes when the tensor's content does, as far as that is visible."""
    try:
        return tensor._version, 0 if sharded else tensor.data_ptr()
    except AttributeError:  # not a tensor: a layer that keeps its weight in parts
        return id(tensor)
    except RuntimeError:
        # made in inference mode, without a version counter: never equal, so always recomputed; or a tensor subclass
        # without storage of its own
        return object() if tensor.is_inference() else tensor._version


def _key(layer: Any, adapter: str, sharded: bool) -> tuple[Any, ...]:
    lora_A, lora_B = layer.factor_parameters(adapter)
    weight = layer.original_weight()
    # the tensors themselves, so that they stay alive and no other one takes their identity
    kernels = choice.uses_kernels(lora_A.device, lora_A.dtype)  # round otherwise
    contents = (content(lora_A, sharded), content(lora_B, sharded), content(weight, sharded), kernels)
    return lora_A, lora_B, weight, layer.scaling[adapter], contents


def _same(one: tuple[Any, ...] | None, other: tuple[Any, ...]) -> bool:
    return one is not None and one[0] is other[0] and one[1] is other[1] and one[2] is other[2] and one[3:] == other[3:]


def base_squared(layer: Any) -> Tensor:
    """||W0||^2 per output row [out]; computed once, again only after W0 changed."""
    weight = layer.original_weight()
    now = content(weight, any(norm.sharded for norm in layer._norms.values()))
    cached = layer._base_norm
    if cached.key is None or cached.key[0] is not weight or cached.key[1] != now:
        cached.value, cached.key = layer.base_weight().row_norms_squared(), (weight, now)
        cached.floor = functional.floor(cached.value)
    return cached.value


@contextmanager
def _undisturbed(device_type: str) -> Iterator[None]:
    """Autocast would lower the products' precision; what is made in inference mode cannot be used in training later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def _compute(layer: Any, adapter: str) -> Tensor:
    squared = base_squared(layer)
    if layer.magnitude_only.get(adapter):
        return squared.sqrt()
    lora_A, lora_B = (factor.detach().to(squared.dtype) for factor in layer.factors(adapter))
    return functional.norm(layer.base_weight(), squared, lora_A, lora_B, float(layer.scaling[adapter]))


def weight_norm(layer: Any, adapter: str) -> Norm:
    """The up-to-date norm of an adapter, refreshed where something it depends on changed. No gradient."""
    norm = layer._norms.get(adapter)
    if norm is None:
        norm = layer._norms[adapter] = Norm()
    if torch.compiler.is_compiling():
        _before_tracing(norm)
        return norm  # refreshed by events only
    key = _key(layer, adapter, norm.sharded)
    if not _same(norm.key, key) or _checking:
        with _undisturbed(key[0].device.type):
            _update(layer, adapter, norm, key)
    return norm


def direction(layer: Any, adapter: str) -> Tensor | None:
    """W0 + s B A [out, in] where the norm had to be refreshed from it, None otherwise. For a weight of one block."""
    norm = layer._norms.setdefault(adapter, Norm())
    key = _key(layer, adapter, norm.sharded)
    if _same(norm.key, key) or not layer.base_weight().has_blocks:
        return None
    with _undisturbed(key[0].device.type):
        squared = base_squared(layer)
        lora_A, lora_B = (factor.detach().to(squared.dtype) for factor in layer.factors(adapter))
        composed = functional.direction(layer.base_weight(), lora_A, lora_B, float(layer.scaling[adapter]))
        _update(layer, adapter, norm, key, torch.linalg.vector_norm(composed, dim=1))
    return composed


def _update(layer: Any, adapter: str, norm: Norm, key: tuple[Any, ...], value: Tensor | None = None) -> None:
    if value is None:
        value = _compute(layer, adapter)
    if not norm.settled or norm.tied is not None:
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
    torch.maximum(value, layer._base_norm.floor, out=value)
    if _same(norm.key, key):
        if norm.value is not None and not torch.equal(norm.value, value):
            worst = ((norm.value - value).abs() / value).max().item()
            raise RuntimeError(
                f"Stale weight norm in module '{layer.name}', adapter '{adapter}': off by {worst:.1e} (relative). A, B "
                "or the base weight was changed through `.data` outside an optimizer; call dora_peft.refresh(model) "
                "after it."
            )
        return
    old = norm.value
    if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
        # In place, since compiled graphs and CUDA graphs read this address; past the version counter, since a graph
        # that still needs the old v needs the old A and B as well, whose counters tell.
        old.data.copy_(value)
    else:
        norm.value = value
    norm.key, norm.folded, norm.stale = key, None, False


def folded(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """s c * B [out, r] and c [out] for evaluation, computed once and dropped by `train()`."""
    norm = weight_norm(layer, adapter)
    magnitude = layer.magnitude(adapter)
    now = content(magnitude)
    known = norm.folded is not None and norm.folded[2] is magnitude and norm.folded[3] == now
    if norm.folded is not None and known and not _checking:
        return norm.folded[:2]
    with torch.inference_mode(False), torch.no_grad():
        value: Any = norm.value
        c = functional.scale(magnitude.detach().view(-1), value, norm.tied)
        lora_B = layer.factor_parameters(adapter)[1].detach()
        product = linear.fold(lora_B, c, layer.scaling[adapter]).to(_compute_dtype(layer, lora_B))
    if norm.folded is not None and known and not torch.equal(norm.folded[1], c):
        raise RuntimeError(
            f"Stale scale in module '{layer.name}', adapter '{adapter}': its magnitude was changed through `.data` "
            "outside an optimizer; call dora_peft.refresh(model) after it."
        )
    if not layer.training:  # amid training it would not be worth its memory
        norm.folded = (product, c, magnitude, now)
    return product, c


def _compute_dtype(layer: Any, lora_B: Tensor) -> torch.dtype:
    weight = layer.original_weight()
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else lora_B.dtype


def initial(layer: Any, adapter: str) -> Tensor:
    """m at creation: ||W0 + s B A||, [out]. Rows where it is 0 are tied from now on."""
    with _undisturbed(layer.factor_parameters(adapter)[0].device.type):
        value = _compute(layer, adapter)
        floored = torch.maximum(value, layer._base_norm.floor)
    layer._norms[adapter] = Norm(floored, _key(layer, adapter, False), tied=_or_none(value == 0), settled=True)
    return value


def _or_none(mask: Tensor) -> Tensor | None:
    return mask if bool(mask.any()) else None


# ---- events


def refresh(model: nn.Module) -> None:
    """Recompute every cached norm of the model's DoRA layers.

    Needed only after A, B or a base weight was written through `.data` outside an optimizer, or by hand where the
    model is compiled.
    """
    for module in model.modules():
        for layer in _layers_of(module):
            layer._base_norm.key = None
            refresh_layer(layer)


def _layers_of(module: nn.Module) -> list[Any]:
    layers = [module] if isinstance(getattr(module, "_norms", None), dict) else []
    taken_over = views.get(module)
    return layers if taken_over is None else [*layers, taken_over]


def refresh_stale(layer: Any) -> None:
    """Make up for the refreshes of one layer that wait for a forward pass."""
    for adapter, norm in layer._norms.items():
        if norm.stale and adapter in layer.lora_magnitude_vector and _computable(layer, adapter):
            key = _key(layer, adapter, norm.sharded)
            with _undisturbed(key[0].device.type):
                _update(layer, adapter, norm, key)


def _before_tracing(norm: Norm) -> None:
    if torch.compiler.is_dynamo_compiling():
        _refresh_eagerly()
    elif norm.stale:
        raise RuntimeError(
            "The weight norm of a DoRA layer is out of date and cannot be computed while the model is exported. Call "
            "model.eval() or dora_peft.refresh(model) before."
        )


@torch.compiler.assume_constant_result  # torch.compile runs it as it is, while it traces
def _refresh_eagerly() -> None:
    global _lazy
    if _lazy:
        _lazy = False
        for layer in list(_layers):
            refresh_stale(layer)


def refresh_layer(layer: Any) -> None:
    """Recompute the norms of one layer; those that cannot be now, at their next use."""
    for adapter, norm in layer._norms.items():
        norm.key, norm.folded = None, None
        if adapter in layer.lora_magnitude_vector and _computable(layer, adapter):
            weight_norm(layer, adapter)


def _computable(layer: Any, adapter: str) -> bool:
    """Whether everything is here: not on the meta device (offloaded, or still to be loaded), not sharded."""
    lora_A, lora_B = layer.factor_parameters(adapter)
    weight = layer.original_weight()
    present = weight.parameters() if isinstance(weight, nn.Module) else (weight,)
    return not any(t.is_meta or _is_sharded(t) for t in (lora_A, lora_B, layer.magnitude(adapter), *present))


def _is_sharded(tensor: Tensor) -> bool:
    """FSDP2's DTensor, or FSDP1's parameter whose storage is elsewhere."""
    return (type(tensor) is not nn.Parameter and hasattr(tensor, "device_mesh")) or not tensor.numel()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    changed = []
    for layer in list(_layers):
        for adapter, norm in layer._norms.items():
            if adapter not in layer.lora_magnitude_vector:
                continue
            lora_A, lora_B = layer.factor_parameters(adapter)
            magnitude = layer.magnitude(adapter)
            factors = [p for p in (lora_A, lora_B) if id(p) in parameters]
            if factors or id(magnitude) in parameters:
                norm.held, norm.folded = True, None
                if any(p.grad is not None for p in factors):
                    norm.sharded = norm.sharded or _is_sharded(lora_A)
                    norm.key = None
                    changed.append((layer, adapter, norm))
            elif not norm.held and (lora_A.requires_grad or lora_B.requires_grad or magnitude.requires_grad):
                norm.key = norm.folded = None  # it may step on copies
    for layer, adapter, norm in changed:
        device_type = layer.magnitude(adapter).device.type
        if _lazy and device_type == "cpu":
            norm.stale = True
        elif _computable(layer, adapter):
            with _undisturbed(device_type):
                _update(layer, adapter, norm, _key(layer, adapter, norm.sharded))


register_optimizer_step_post_hook(_after_optimizer_step)


def is_checking() -> bool:
    return _checking


@contextmanager
def checking() -> Iterator[None]:
    """Recompute v at every use and raise a RuntimeError that names the module where a cached one is stale."""
    global _checking
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before
