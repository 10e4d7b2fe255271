"""v of each adapter of a layer: the check of its content at every use, and the refresh if that changed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..bases.inspection import parts
from ..bases.offload import at_hand
from ..ops import choice
from ..ops.content import Bits, Fingerprint
from ..ops.norm import Sharing, floor, row_norms
from . import device, grouped
from .adapted import AdaptedLayer
from .lifecycle import settle_as
from .records import BaseNorm, Norm, Snapshot, Stored

# What stands for PEFT's own layers while accelerate_use_dora() is on.
views: weakref.WeakKeyDictionary[nn.Module, AdaptedLayer] = weakref.WeakKeyDictionary()
_checking = False


def up_to_date(layer: AdaptedLayer, adapter: str) -> Snapshot:
    """v of an adapter, refreshed if A, B, s or W0 hold something else than when it was computed. No gradient."""
    factors, scaling, stored = layer.factor_parameters(adapter), float(layer.scaling[adapter]), layer.original_weight()
    return up_to_date_for(layer, adapter, factors, scaling, stored)


def up_to_date_for(
    layer: AdaptedLayer,
    adapter: str,
    factors: tuple[Tensor, Tensor],
    scaling: float,
    stored: Stored,
    *,
    stands_in: bool = False,
) -> Snapshot:
    """`up_to_date` of these factors as stored, s and W0 as stored, which a caller may lend for one call.

    Args:
        stands_in: Whether `stored` is another tensor than the layer's weight.
    """
    lora_A, lora_B = factors
    by_kernels = computes_by_kernels(lora_A, stored)
    known = fresh(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels, stands_in)
    if known is None:
        known, _, _ = refreshed(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels, stands_in)
    return known


def computes_by_kernels(lora_A: Tensor, stored: Stored) -> bool:
    """Whether kernels compute v of these factors over W0 as stored, if they can read it."""
    if isinstance(stored, Tensor) and stored.is_floating_point():
        return choice.uses_kernels(lora_A.device, lora_A.dtype, stored.dtype)
    return choice.uses_kernels(lora_A.device, lora_A.dtype)


def fresh(
    layer: AdaptedLayer,
    adapter: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stored: Stored,
    by_kernels: bool,
    stands_in: bool = False,
) -> Snapshot | None:
    """v if it needs no refresh, or if a device refreshes it by itself; else None."""
    norm = layer._norms.get(adapter)
    if norm is None or not norm.settled:
        norm = settle(layer, adapter)
    known = None
    if by_kernels:
        # before all else: in training every layer of a model goes this way
        value = grouped.take(norm, lora_A, lora_B, scaling, stored) if norm.tied is None else None
        if value is None:
            known = _on_device(layer, adapter, norm, lora_A, lora_B, scaling, stored, stands_in)
        else:
            known = Snapshot(value, None, None, None, scaling, None, True)
    if known is None:
        known = norm.known
        if known is None or not _fits(known, lora_A, lora_B, scaling, stored, by_kernels):
            return None
        base = known.base
        if base is not None and base.parts is not None and not (stands_in or base.made_from(layer.get_base_layer())):
            return None
    if _checking:
        _check(layer, adapter, known, lora_A, lora_B, scaling, _weight(stored, stands_in))
    return known


def _fits(known: Snapshot, lora_A: Tensor, lora_B: Tensor, scaling: float, stored: Stored, by_kernels: bool) -> bool:
    """Whether v still is that of these factors [r, in] and [out, r], s and W0 as stored, computed in this way."""
    base = known.base
    if known.scaling != scaling or base is None or known.by_kernels is not by_kernels:
        return False
    if known.lora_A is not None and known.lora_B is not None:
        # the one that training changes most first
        if not known.lora_B.fits(lora_B) or not known.lora_A.fits(lora_A):
            return False
    elif lora_A.device != known.value.device:
        return False
    return base.weight.fits(stored)


def refreshed(
    layer: AdaptedLayer,
    adapter: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stored: Stored,
    by_kernels: bool,
    stands_in: bool = False,
    *,
    sharing: Sharing | None = None,
) -> tuple[Snapshot, Tensor | None, Tensor | None]:
    """v, computed now, and W0 + s B A [out, in] and x W0^T [N, out], if they were made for it, see `Sharing`."""
    norm = layer._norms[adapter]
    if any(t.is_meta for t in (lora_A, lora_B, layer.magnitude(adapter))):
        empty = torch.empty(layer.magnitude(adapter).numel(), device="meta")
        return Snapshot(empty, norm.tied, None, None, scaling, None, False), None, None
    weight = _weight(stored, stands_in)
    with _undisturbed(lora_A.device.type), at_hand(layer.get_base_layer()):
        return _refresh(layer, adapter, norm, lora_A, lora_B, scaling, weight, by_kernels, sharing)


def _refresh(
    layer: AdaptedLayer,
    adapter: str,
    norm: Norm,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight: Tensor | None,
    by_kernels: bool,
    sharing: Sharing | None,
) -> tuple[Snapshot, Tensor | None, Tensor | None]:
    """`refreshed` with the weight here and nothing recorded."""
    # Copied first: what another thread writes to the factors while v is computed is seen next time.
    trained = not layer.magnitude_only.get(adapter)
    copy_A, copy_B = (Bits(lora_A), Bits(lora_B)) if trained else (None, None)
    base, composed, product = base_norm(layer, weight), None, None
    if sharing is None or not trained:
        value = _compute(layer, adapter, base.squared, lora_A, lora_B, scaling, weight)
    else:
        A, B = (factor.detach().to(base.squared.dtype) for factor in layer.as_matrices(lora_A, lora_B))
        value, composed, product = sharing.norm(lambda: layer.base_weight(weight), base.squared, A, B, scaling)
    if norm.tied is not None:
        norm.tied = norm.tied.to(value.device)
        _follow(layer.magnitude(adapter), norm.tied, value)
    value = torch.maximum(value, base.floor)
    known = norm.renew(Snapshot(value, norm.tied, copy_A, copy_B, scaling, base, by_kernels))
    return known, composed, product


def _weight(stored: Stored, stands_in: bool) -> Tensor | None:
    """The tensor in the place of the layer's weight, None if there is none."""
    if not stands_in:
        return None
    assert isinstance(stored, Tensor)
    return stored


def _on_device(
    layer: AdaptedLayer,
    adapter: str,
    norm: Norm,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stored: Stored,
    stands_in: bool,
) -> Snapshot | None:
    """v that the device checks, None if its kernels cannot."""
    if any(getattr(t, "is_meta", False) for t in (lora_A, lora_B, stored)):
        return None
    weight = _weight(stored, stands_in)
    with _undisturbed(lora_A.device.type):
        value = device.check(layer, norm, lora_A, lora_B, scaling, stored, lambda: layer.base_weight(weight))
        if value is None:
            return None
        magnitude = layer.magnitude(adapter)
        if norm.tied is not None and isinstance(magnitude, nn.Parameter):
            norm.tied = norm.tied.to(value.device)
            device.follow(magnitude, norm.tied, value)
    return Snapshot(value, norm.tied, None, None, scaling, None, True)


class _undisturbed:
    """Autocast would lower the products' precision; what is made in inference mode cannot be used in training later.

    In the usual case neither is on, and gradients alone are switched off: the three contexts take 20 us.
    """

    def __init__(self, device_type: str) -> None:
        self.contexts, self.entered = ExitStack(), list[AbstractContextManager[object]]()
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device_type):
            self.entered = [torch.inference_mode(False), torch.autocast(device_type, enabled=False)]

    def __enter__(self) -> None:
        self.grad = torch.is_grad_enabled()
        for context in self.entered:
            self.contexts.enter_context(context)
        torch.set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(self.grad)
        self.contexts.close()


def base_norm(layer: AdaptedLayer, weight: Tensor | None = None) -> BaseNorm:
    """||W0||^2 per output row; computed once, again only if W0 holds something else.

    Args:
        weight: Stands in for the layer's weight.
    """
    stored = layer.original_weight() if weight is None else weight
    known = layer._base_norm
    if (
        known is None
        or not known.weight.fits(stored)
        or (weight is None and not known.made_from(layer.get_base_layer()))
    ):
        with _undisturbed(getattr(stored, "device", torch.device("cpu")).type):
            squared = layer.base_weight(weight).row_norms_squared()
            tensors = None if weight is not None else parts(layer.get_base_layer())
            others = None if tensors is None else tuple(map(Fingerprint, tensors))
            known = layer._base_norm = BaseNorm(squared, floor(squared), Fingerprint(stored), others)
    return known


def base_squared(layer: AdaptedLayer) -> Tensor:
    """||W0||^2 per output row [out]."""
    return base_norm(layer).squared


def _compute(
    layer: AdaptedLayer,
    adapter: str,
    squared: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight: Tensor | None,
) -> Tensor:
    """v [out], not floored, for ||W0||^2 per row."""
    if layer.magnitude_only.get(adapter):
        return squared.sqrt()
    A, B = (factor.detach().to(squared.dtype) for factor in layer.as_matrices(lora_A, lora_B))
    return row_norms(layer.base_weight(weight), squared, A, B, float(scaling))


def settle(layer: AdaptedLayer, adapter: str) -> Norm:
    """The norm's record with its tied rows known."""
    norm = layer._norms.get(adapter)
    if norm is not None and norm.settled:
        return norm
    if any(t.is_meta for t in (*layer.factor_parameters(adapter), layer.magnitude(adapter))):
        # nothing is here yet
        return layer._norms.setdefault(adapter, Norm())
    layer.settle_late(adapter)
    return layer._norms[adapter]


def _follow(magnitude: Tensor, tied: Tensor, value: Tensor) -> None:
    """m = v on tied rows: of a parameter of the layer, not of a tensor that a caller lent for one call.

    Not through the version counter: a forward pass may run between a backward pass and its optimizer step.
    """
    if isinstance(magnitude, nn.Parameter):
        magnitude.data.view(-1)[tied] = value[tied].to(magnitude.dtype)


def initial(layer: AdaptedLayer, adapter: str) -> Tensor:
    """m at creation: ||W0 + s B A||, [out]. Rows in which it is 0 are tied from now on."""
    lora_A, lora_B = layer.factor_parameters(adapter)
    with _undisturbed(lora_A.device.type):
        base = base_norm(layer)
        value = _compute(layer, adapter, base.squared, lora_A, lora_B, float(layer.scaling[adapter]), None)
        zero = value == 0
        settle_as(layer, adapter, zero if bool(zero.any()) else None)
    return value


def refresh(model: nn.Module) -> None:
    """Compute every norm of the model's DoRA layers again, at its next use.

    Needed only after a part of a base weight was written through `.data`: A, B and m are compared in full at every
    forward pass, a base weight by its version counter and a sample of its elements.
    """
    for module in model.modules():
        own = cast(AdaptedLayer, module) if isinstance(getattr(module, "_norms", None), dict) else None
        for layer in (own, views.get(module)):
            if layer is not None:
                layer._base_norm = None
                for norm in layer._norms.values():
                    norm.known = norm.folded = norm.device = None


def _check(
    layer: AdaptedLayer,
    adapter: str,
    known: Snapshot,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight: Tensor | None,
) -> None:
    with _undisturbed(lora_A.device.type), at_hand(layer.get_base_layer()):
        squared = layer.base_weight(weight).row_norms_squared()
        value = _compute(layer, adapter, squared, lora_A, lora_B, scaling, weight)
        value = torch.maximum(value, floor(squared))
        worst = ((known.value - value).abs() / value).max().item() if len(value) else 0.0
    if not worst <= 64 * torch.finfo(value.dtype).eps:
        raise RuntimeError(
            f"Stale weight norm in module '{layer.name}', adapter '{adapter}': off by {worst:.1e} (relative). A part "
            "of the base weight was changed through `.data`; call dora_peft.refresh(model) after it."
        )


def is_checking() -> bool:
    """Whether every use recomputes v, see `checking`."""
    return _checking


@contextmanager
def checking() -> Iterator[None]:
    """Recompute v at every use and raise a RuntimeError that names the module if a cached one is stale."""
    global _checking
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before
