"""Writing W' into the base layer, and bringing the original weight back: what `DoraLayer.merge` and its like do.

The formula is in ops/merging.py. How a weight of each kind is kept, installed and restored is in bases/. Who else in a
model uses a weight is found out in merge_checks.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..bases import BaseWeight
from ..ops import merging
from .kind import Kind


class MergingLayer(Protocol):
    """What merging uses of a `DoraLayer`."""

    name: str
    merged_adapters: list[str]
    other_names: list[str]
    kind: Kind
    scaling: dict[str, float]
    _original: tuple[nn.Parameter] | None

    def get_base_layer(self) -> nn.Module: ...
    def base_weight(self) -> BaseWeight: ...
    def factors(self, adapter: str) -> tuple[Tensor, Tensor]: ...
    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]: ...
    def scale(self, adapter: str) -> Tensor: ...


def merge(layer: MergingLayer, adapters: list[str], safe_merge: bool, offload_original: bool) -> None:
    """Write W' of adapters that are not merged yet, composed in order with those that are, into the base layer.

    Args:
        layer: A layer that holds all of them.
        adapters: Their names; nothing happens if there are none.
        safe_merge: See `DoraLayer.merge`.
        offload_original: See `DoraLayer.merge`.

    Raises:
        NotImplementedError: See `check_mergeable`.
        ValueError: With `safe_merge`, the merged weight is not finite. The base layer is as before in either case.
    """
    if not adapters:
        return
    replacement = merged_weight(layer, layer.merged_adapters + adapters, safe_merge)
    weight, base = layer.base_weight(), layer.get_base_layer()
    if layer._original is None:
        layer._original = (weight.keep_original(base, offload_original),)
    weight.install(base, replacement)
    layer.merged_adapters.extend(adapters)


def merged_weight(layer: MergingLayer, adapters: list[str], safe_merge: bool) -> nn.Parameter:
    """W' of adapters composed in order, of the base weight's own kind; the layer is as it was.

    Raises:
        NotImplementedError, ValueError: See `merge`.
    """
    check_mergeable(layer, brought_in=True)
    weight = layer.base_weight()
    composed = parts(layer, adapters, weight)
    finite = True

    def rows(block: Tensor, start: int, stop: int) -> Tensor:
        nonlocal finite
        merged = merging.merged_rows(block, start, stop, composed, out=block)
        # before it is quantised, which may hide a NaN
        finite = finite and (not safe_merge or merging.is_finite(merged))
        return merged

    with torch.no_grad():
        replacement = weight.replacement(rows)
    # quantised, it may hold no floats
    if safe_merge and not (finite and (not replacement.is_floating_point() or merging.is_finite(replacement))):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken "
            f"(module '{layer.name}')."
        )
    return replacement


def unmerge(layer: MergingLayer) -> None:
    """Restore the original weight parameter, bit for bit; nothing happens if nothing is merged.

    Raises:
        RuntimeError: The layer is marked as merged but holds no original weight.
    """
    if layer._original is None:
        if layer.merged_adapters:
            raise RuntimeError(f"Module '{layer.name}' is marked as merged but its original weight is gone.")
        return
    weight, (original,) = layer.base_weight(), layer._original
    layer._original = None
    weight.restore(layer.get_base_layer(), original)
    layer.merged_adapters.clear()


def parts(layer: MergingLayer, adapters: list[str], weight: BaseWeight) -> list[tuple[Tensor, Tensor, float, Tensor]]:
    """What `merging.merged_rows` composes: A, B, s and c of each adapter, in the device and dtype of W0's rows."""
    found = []
    for adapter in adapters:
        lora_A, lora_B = (t.detach().to(weight.device, weight.dtype) for t in layer.factors(adapter))
        c = layer.scale(adapter).detach().to(weight.device, weight.dtype)
        found.append((lora_A, lora_B, float(layer.scaling[adapter]), c))
    return found


def delta_weight(layer: MergingLayer, adapter: str) -> Tensor:
    """W' - W0 in the base weight's shape and the dtype of the adapter's B.

    Raises:
        NotImplementedError: The base gives no rows, or W' is not of the base's kind.
    """
    weight = layer.base_weight()
    base = layer.get_base_layer()
    obstacle = _obstacle(layer, weight.has_rows)
    if obstacle is not None:
        raise NotImplementedError(f"W' - W0 is not available for module '{layer.name}': {obstacle}")
    with torch.no_grad():
        composed = parts(layer, [adapter], weight)
        delta = torch.empty(weight.out_features, weight.in_features, dtype=weight.dtype, device=weight.device)
        for start, stop, rows in weight.blocks():
            merging.merged_rows(rows, start, stop, composed, out=delta[start:stop]).sub_(rows)
    return layer.kind.in_layout(base, delta).to(layer.factor_parameters(adapter)[1].dtype)


def check_mergeable(layer: MergingLayer, brought_in: bool) -> None:
    """Nothing if a merged weight can be written and stays.

    Args:
        layer: The layer.
        brought_in: Whether an offloaded weight should be here already.

    Raises:
        NotImplementedError: It cannot: quantised without a way back, computed from other tensors, not here, or of a
            module that the model also calls without the adapter.
    """
    base = layer.get_base_layer()
    stored = base._parameters.get("weight")
    obstacle = _obstacle(layer, layer.base_weight().mergeable)
    if obstacle is not None:
        reason = f"{obstacle} Use the adapter unmerged."
    elif stored is None:
        reason = (
            "its weight is not a parameter but computed from others at each call (weight_norm, spectral_norm, "
            "parametrize, prune), which would overwrite a merged one. Use the adapter unmerged, or make the weight "
            "a parameter before the adapter is added, with torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm, remove_spectral_norm or prune.remove."
        )
    elif layer.other_names:
        reason = (
            f"the model also uses this very module as {', '.join(layer.other_names)}, without the adapter, and a "
            "merged weight would change that as well. Use the adapter unmerged, or give the model a copy of the "
            "module there."
        )
    elif brought_in and stored.is_meta:
        reason = (
            "its weight is on the meta device (offloaded). Use the model's merge_adapter() or merge_and_unload(), "
            "which bring it in."
        )
    else:
        return
    raise NotImplementedError(f"Merging is not supported for module '{layer.name}' ({type(base).__name__}): {reason}")


def _obstacle(layer: MergingLayer, writable: bool) -> str | None:
    """Why there is no W' for the base layer, None if there is one.

    Args:
        writable: Whether the base weight gives what is asked for.
    """
    obstacle = layer.kind.merge_obstacle(layer.get_base_layer())
    return obstacle if obstacle is not None or writable else "its weight cannot be written back."
