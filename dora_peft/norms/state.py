"""v of each adapter of a layer: the check of its content at every use, and the refresh where that changed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.inspection import parts
from ..bases.offload import at_hand
from ..ops import choice, functional
from ..ops.content import Bits, Fingerprint
from . import device

# What stands for PEFT's own layers while accelerate_use_dora() is on.
views: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
# Layers by number, for operators, which take numbers and tensors only.
layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_checking = False


@dataclass(frozen=True)
class BaseNorm:
    """||W0||^2 per output row, and the smallest v that is divided by, both [out], with the weight they belong to.

    `parts` are those of the tensors that W0 is made from besides, None for a layer that has none ever, see
    `base_checks.parts`.
    """

    squared: Tensor
    floor: Tensor
    weight: Fingerprint
    parts: tuple[Fingerprint, ...] | None

    def made_from(self, layer: Any) -> bool:
        """Whether the parts of the layer's weight still are what they were."""
        if self.parts is None:
            return True
        tensors = parts(layer.get_base_layer())
        if tensors is None or len(tensors) != len(self.parts):
            return False
        return all(part.fits(tensor) for part, tensor in zip(self.parts, tensors, strict=True))


@dataclass(frozen=True)
class Snapshot:
    """v and all that it was computed from. Never changed: another content gets another one.

    Attributes:
        value: v [out], fp32 (fp64 for an fp64 base), floored where it vanishes over a non-zero row of W0.
        tied: Rows whose magnitude follows their norm [out, bool], None where there are none.
        lora_A, lora_B: What A and B held; None for an adapter of magnitudes alone, whose factors are 0.
        base: None for a v that a device checks, or on the meta device: it is not looked up again.
        by_kernels: Whether Triton's kernels computed it, which round differently.
    """

    value: Tensor
    tied: Tensor | None
    lora_A: Bits | None
    lora_B: Bits | None
    scaling: float
    base: BaseNorm | None
    by_kernels: bool

    def fits(self, lora_A: Tensor, lora_B: Tensor, scaling: float, weight: Any, layer: Any = None) -> bool:
        """Whether v still is that of these factors [r, in] and [out, r], s and W0 as stored, and of the layer's parts.

        Args:
            layer: None where `weight` is dense, or no weight of the layer's own.
        """
        if self.scaling != scaling or self.base is None:
            return False
        if self.lora_A is not None and self.lora_B is not None:
            # the one that training changes most first
            if not self.lora_B.fits(lora_B) or not self.lora_A.fits(lora_A):
                return False
        elif lora_A.device != self.value.device:
            return False
        if self.by_kernels != choice.uses_kernels(lora_A.device, lora_A.dtype):
            return False
        return self.base.weight.fits(weight) and (layer is None or self.base.made_from(layer))


@dataclass
class Norm:
    """What a layer knows about the norm of one adapter. A copy, or another process, computes it again.

    Attributes:
        tied: Rows whose magnitude follows their norm [out, bool], None where there are none.
        settled: Whether `tied` is known: from creation on, or read at loading; otherwise guessed at the first use.
        known: The last v, None where there is none yet.
        folded: What evaluation keeps, see evaluation.py.
        device: What a device remembers, see device.py.
    """

    tied: Tensor | None = None
    settled: bool = False
    known: Snapshot | None = None
    folded: Any = None
    device: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"tied": self.tied, "settled": self.settled, "known": None, "folded": None, "device": None}


def register(layer: Any) -> int:
    """A number by which operators find `layer`, for as long as it lives."""
    number = next(_numbers)
    layers[number] = layer
    return number


def weight_norm(
    layer: Any,
    adapter: str,
    factors: tuple[Tensor, Tensor] | None = None,
    scaling: float | None = None,
    weight: Any = None,
) -> Snapshot:
    """v of an adapter, refreshed if A, B, s or W0 hold something else than when it was computed. No gradient.

    Args:
        factors: A and B as stored, the layer's own where None; likewise the scaling s, and W0 as stored.
    """
    norm = settle(layer, adapter)
    lora_A, lora_B = layer.factor_parameters(adapter) if factors is None else factors
    scaling = layer.scaling[adapter] if scaling is None else scaling
    stored = layer.original_weight() if weight is None else weight
    if choice.uses_kernels(lora_A.device, lora_A.dtype):
        found = _on_device(layer, adapter, norm, lora_A, lora_B, scaling, stored, weight)
        if found is not None:
            return found
    known = norm.known
    if known is not None and known.fits(lora_A, lora_B, scaling, stored, layer if weight is None else None):
        if _checking:
            _check(layer, adapter, known, lora_A, lora_B, scaling, weight)
        return known
    with _undisturbed(lora_A.device.type), at_hand(layer.get_base_layer()):
        return _refresh(layer, adapter, norm, lora_A, lora_B, scaling, weight)


def _on_device(
    layer: Any, adapter: str, norm: Norm, lora_A: Tensor, lora_B: Tensor, scaling: float, stored: Any, weight: Any
) -> Snapshot | None:
    """v that the device checks, None if its kernels cannot."""
    if any(getattr(t, "is_meta", False) for t in (lora_A, lora_B, stored)):
        return None

    def seam() -> Any:
        return layer.base_weight() if weight is None else layer.base_weight_of(weight)

    with _undisturbed(lora_A.device.type):
        value = device.check(layer, norm, lora_A, lora_B, scaling, stored, seam)
        if value is None:
            return None
        if norm.tied is not None and isinstance(layer.magnitude(adapter), nn.Parameter):
            norm.tied = norm.tied.to(value.device)
            device.follow(layer.magnitude(adapter), norm.tied, value)
    known = Snapshot(value, norm.tied, None, None, scaling, None, True)
    if _checking:
        _check(layer, adapter, known, lora_A, lora_B, scaling, weight)
    return known


def composed(layer: Any, adapter: str) -> tuple[Snapshot, Tensor | None]:
    """`weight_norm`, and W0 + s B A [out, in] if the norm had to be refreshed from it. For a weight of one block."""
    norm = settle(layer, adapter)
    lora_A, lora_B = layer.factor_parameters(adapter)
    scaling, known = layer.scaling[adapter], norm.known
    if known is not None and known.fits(lora_A, lora_B, scaling, layer.original_weight()) and not _checking:
        return known, None
    if _checking or not layer.base_weight().has_blocks:
        return weight_norm(layer, adapter), None
    with _undisturbed(lora_A.device.type):
        squared = base_squared(layer)
        A, B = (factor.detach().to(squared.dtype) for factor in layer.as_matrices(lora_A, lora_B))
        direction = functional.direction(layer.base_weight(), A, B, float(scaling))
        value = torch.linalg.vector_norm(direction, dim=1)
        return _refresh(layer, adapter, norm, lora_A, lora_B, scaling, None, value), direction


@contextmanager
def _undisturbed(device_type: str) -> Iterator[None]:
    """Autocast would lower the products' precision; what is made in inference mode cannot be used in training later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def base_norm(layer: Any, weight: Any = None) -> BaseNorm:
    """||W0||^2 per output row; computed once, again only if W0 holds something else."""
    stored = layer.original_weight() if weight is None else weight
    known = layer._base_norm
    if known is None or not known.weight.fits(stored) or (weight is None and not known.made_from(layer)):
        with _undisturbed(getattr(stored, "device", torch.device("cpu")).type):
            seam = layer.base_weight() if weight is None else layer.base_weight_of(weight)
            squared = seam.row_norms_squared()
            tensors = None if weight is not None else parts(layer.get_base_layer())
            others = None if tensors is None else tuple(map(Fingerprint, tensors))
            known = layer._base_norm = BaseNorm(squared, functional.floor(squared), Fingerprint(stored), others)
    return known


def base_squared(layer: Any) -> Tensor:
    """||W0||^2 per output row [out]."""
    return base_norm(layer).squared


def _compute(
    layer: Any, adapter: str, squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight: Any
) -> Tensor:
    """v [out], not floored, for ||W0||^2 per row."""
    if layer.magnitude_only.get(adapter):
        return squared.sqrt()
    A, B = (factor.detach().to(squared.dtype) for factor in layer.as_matrices(lora_A, lora_B))
    seam = layer.base_weight() if weight is None else layer.base_weight_of(weight)
    return functional.norm(seam, squared, A, B, float(scaling))


def _refresh(
    layer: Any,
    adapter: str,
    norm: Norm,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight: Any,
    value: Tensor | None = None,
) -> Snapshot:
    """A new snapshot, with v from `value` [out] if that is given."""
    if any(t.is_meta for t in (lora_A, lora_B, layer.magnitude(adapter))):
        empty = torch.empty(layer.magnitude(adapter).numel(), device="meta")
        return Snapshot(empty, norm.tied, None, None, scaling, None, False)
    # Copied first: what another thread writes to the factors while v is computed is seen next time.
    trained = not layer.magnitude_only.get(adapter)
    copy_A, copy_B = (Bits(lora_A), Bits(lora_B)) if trained else (None, None)
    base = base_norm(layer, weight)
    if value is None:
        value = _compute(layer, adapter, base.squared, lora_A, lora_B, scaling, weight)
    if norm.tied is not None:
        norm.tied = norm.tied.to(value.device)
        _follow(layer.magnitude(adapter), norm.tied, value)
    by_kernels = choice.uses_kernels(lora_A.device, lora_A.dtype)
    value = torch.maximum(value, base.floor)
    norm.known = known = Snapshot(value, norm.tied, copy_A, copy_B, scaling, base, by_kernels)
    norm.folded = None
    return known


def settle(layer: Any, adapter: str) -> Norm:
    """The norm's record with its tied rows known."""
    norm = layer._norms.get(adapter)
    if norm is not None and norm.settled:
        return norm
    if any(t.is_meta for t in (*layer.factor_parameters(adapter), layer.magnitude(adapter))):
        return layer._norms.setdefault(adapter, Norm())  # nothing is here yet
    layer.settle_late(adapter)
    return layer._norms[adapter]


def _follow(magnitude: Tensor, tied: Tensor, value: Tensor) -> None:
    """m = v on tied rows: of a parameter of the layer, not of a tensor that a caller lent for one call.

    Not through the version counter: a forward pass may run between a backward pass and its optimizer step.
    """
    if isinstance(magnitude, nn.Parameter):
        magnitude.data.view(-1)[tied] = value[tied].to(magnitude.dtype)


def initial(layer: Any, adapter: str) -> Tensor:
    """m at creation: ||W0 + s B A||, [out]. Rows where it is 0 are tied from now on."""
    lora_A, lora_B = layer.factor_parameters(adapter)
    with _undisturbed(lora_A.device.type):
        base = base_norm(layer)
        value = _compute(layer, adapter, base.squared, lora_A, lora_B, layer.scaling[adapter], None)
        layer._norms[adapter] = Norm(tied=_or_none(value == 0), settled=True)
    return value


def _or_none(mask: Tensor) -> Tensor | None:
    return mask if bool(mask.any()) else None


# ---- the check of the check


def refresh(model: nn.Module) -> None:
    """Compute every norm of the model's DoRA layers again, at its next use.

    Needed only after a part of a base weight was written through `.data`: A, B and m are compared in full at every
    forward pass, a base weight by its version counter and a sample of its elements.
    """
    for module in model.modules():
        for layer in _layers_of(module):
            layer._base_norm = layer._shortcut = None
            for norm in layer._norms.values():
                norm.known = norm.folded = norm.device = None


def _layers_of(module: nn.Module) -> list[Any]:
    found = [module] if isinstance(getattr(module, "_norms", None), dict) else []
    taken_over = views.get(module)
    return found if taken_over is None else [*found, taken_over]


def _check(
    layer: Any, adapter: str, known: Snapshot, lora_A: Tensor, lora_B: Tensor, scaling: float, weight: Any
) -> None:
    with _undisturbed(lora_A.device.type), at_hand(layer.get_base_layer()):
        seam = layer.base_weight() if weight is None else layer.base_weight_of(weight)
        squared = seam.row_norms_squared()
        value = _compute(layer, adapter, squared, lora_A, lora_B, scaling, weight)
        value = torch.maximum(value, functional.floor(squared))
        worst = ((known.value - value).abs() / value).max().item() if len(value) else 0.0
    if not worst <= 64 * torch.finfo(value.dtype).eps:
        raise RuntimeError(
            f"Stale weight norm in module '{layer.name}', adapter '{adapter}': off by {worst:.1e} (relative). A part "
            "of the base weight was changed through `.data`; call dora_peft.refresh(model) after it."
        )


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
