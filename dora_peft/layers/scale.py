"""c = m / v of one adapter of a layer, by each implementation."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .. import norms, reference
from ..ops import choice
from ..ops.compiled import can_compose
from ..ops.norm import attach_norm_gradient, floor, scale, weight_norm
from .kind import ComputingLayer


def scale_of(
    layer: ComputingLayer,
    adapter: str,
    *,
    differentiable: bool = False,
    how: choice.How | None = None,
    known: norms.Snapshot | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """c [out]; with the norm's gradient if `differentiable` and the adapter's config ask for it.

    Args:
        how: What `choice.decide` said, if the caller has asked.
        known: The adapter's norm, if the caller has just asked for it.
        magnitude: m, if it is another than the layer holds.
    """
    how = choice.decide(torch.device("cpu")) if how is None else how
    magnitude = (layer.magnitude(adapter) if magnitude is None else magnitude).view(-1)
    trained = differentiable and not layer.detach_norm[adapter]
    if how == "dense":
        # v by plain operations: a transform's A and B are no parameters, and a recording has to hold for others. The
        # same operations whether gradients are on or not: a tracer compares.
        value, tied = dense_norm(layer, adapter), _tied(layer, adapter)
        return scale(magnitude, value if trained else value.detach(), tied)
    trained = trained and torch.is_grad_enabled() and not layer.magnitude_only[adapter]
    if how == "compiled":
        if trained or not _computes_in_graph(layer, adapter):
            value, tied = norms.traced(layer, adapter)
        else:
            value, tied = dense_norm(layer, adapter).detach(), None
        if trained:
            factors = layer.as_matrices(*layer.factor_parameters(adapter))
            value = attach_norm_gradient(value, _dense_matrix(layer), *factors, layer.scaling[adapter])
        return scale(magnitude, value, tied)
    known = norms.up_to_date(layer, adapter) if known is None else known
    value = known.value
    if trained:
        lora_A, lora_B = layer.as_matrices(*layer.factor_parameters(adapter))
        if lora_A.requires_grad or lora_B.requires_grad:
            squared = norms.base_squared(layer)
            value = weight_norm(layer.base_weight(), squared, lora_A, lora_B, float(layer.scaling[adapter]), value)
    return scale(magnitude, value, known.tied)


def _computes_in_graph(layer: ComputingLayer, adapter: str) -> bool:
    """Whether the graph of a training pass computes v, see ops/compiled.py; else it is looked up, as where some rows'
    magnitudes have to follow it."""
    if layer.magnitude_only[adapter] or not torch.is_grad_enabled() or norms.traced_ties(layer, adapter) is not None:
        return False
    weight = layer.get_base_layer()._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or getattr(layer.get_base_layer(), "groups", 1) > 1:
        return False
    return can_compose(weight, *layer.factor_parameters(adapter), layer.magnitude(adapter))


def _tied(layer: ComputingLayer, adapter: str) -> Tensor | None:
    """The rows whose magnitude follows their norm [out, bool], None if there are none."""
    if not norms.is_settled(layer, adapter) and (choice.transforming() or choice.tracing()):
        # no value can be looked at
        return None
    return norms.settle(layer, adapter).tied


def dense_norm(layer: ComputingLayer, adapter: str) -> Tensor:
    """v [out] from the dense W0 + s B A, computed at every call, as in the reference."""
    matrix = wide_matrix(layer)
    least = floor(matrix.detach().square().sum(1))
    if layer.magnitude_only[adapter]:
        return torch.maximum(torch.linalg.vector_norm(matrix, dim=1), least)
    factors = layer.as_matrices(*layer.factor_parameters(adapter))
    lora_A, lora_B = (factor.to(matrix.dtype) for factor in factors)
    device = matrix.device.type
    # which would lower the precision of B A
    without = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with without:
        return torch.maximum(reference.weight_norm(matrix, lora_A, lora_B, layer.scaling[adapter]), least)


def wide_matrix(layer: ComputingLayer) -> Tensor:
    """W0 [out, in] in the dtype that norms are computed in.

    Raises:
        RuntimeError: The base gives no rows.
    """
    stored, base = layer.original_weight(), layer.get_base_layer()
    # the tensors of a recording are of other classes
    if isinstance(stored, Tensor) and (choice.tracing() or type(stored) in (Tensor, nn.Parameter)):
        if stored.is_floating_point() and getattr(base, "groups", 1) == 1:
            matrix = layer.kind.matrix(base, stored.detach())
            return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        weight = layer.base_weight(stored)
    else:
        weight = layer.base_weight()
    if not weight.has_rows:
        raise RuntimeError(
            "The reference implementation, torch.func and recordings (torch.export, torch.jit.trace) need a dense "
            f"weight, which module '{layer.name}' ({type(base).__name__}) cannot give. Use implementation('auto')."
        )
    return weight.dense()


def _dense_matrix(layer: ComputingLayer) -> Tensor:
    """W0 [out, in] as a view of the base layer's weight.

    Raises:
        NotImplementedError: The base has no dense one.
    """
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or getattr(base, "groups", 1) > 1:
        raise NotImplementedError(
            f"torch.compile with detach_norm=False needs a dense weight, which module '{layer.name}' "
            f"({type(base).__name__}) has not. Use detach_norm=True, or train without compiling."
        )
    return layer.kind.matrix(base, weight)
