"""DoRA on nn.Linear, transformers' Conv1D, and every quantised linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import norms
from ..bases import BaseWeight
from ..bases.inspection import linear_map
from ..ops import choice
from ..ops.compiled import can_compose, composed_norm, composed_product
from ..ops.compose import compose, linear_branch
from ..ops.linear import linear_eval, linear_operator
from ..ops.linear_autograd import apply, flattened
from ..ops.norm import Sharing, scale
from ..ops.options import options_for
from .forward import (
    adapt_keeping_output,
    base_output,
    bias_of,
    changed_too_early,
    dense_weight,
    dropout_probability,
    drops_base,
    held_weight,
)
from .kind import ComputingLayer, Kind
from .layer import DoraLayer
from .scale import scale_of
from .shortcut import Holder, Shortcut, divides_inside, shortcut_for


class LinearKind(Kind):
    """How linear layers differ from the other kinds."""

    def multiplies(self, base: nn.Module, forward: object) -> bool:
        return forward is nn.Linear.forward or forward is Conv1D.forward

    def oriented(self, base: nn.Module, weight: Tensor) -> Tensor:
        """W0 [out, in]."""
        return weight.T if type(base).forward is Conv1D.forward else weight

    def multiply(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def low_rank(self, layer: ComputingLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return linear_branch(x, lora_A, lora_B, scaling)

    def matrix(self, base: nn.Module, weight: Tensor) -> Tensor:
        return weight.T if isinstance(base, Conv1D) else weight

    def in_layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T if isinstance(base, Conv1D) else matrix

    def computes_otherwise(self, base: nn.Module) -> bool:
        if type(base) is nn.Linear or type(base) is Conv1D or self.multiplies(base, type(base).forward):
            return False
        weight = base._parameters.get("weight")
        return type(weight) is nn.Parameter and weight.is_floating_point() and not hasattr(base, "qweight")


class BaseProduct:
    """The base layer as a product, for the backward pass of a weight that is not at hand as a dense matrix."""

    def __init__(
        self, layer: ComputingLayer, bias: Tensor | None, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        self.layer, self.bias, self.args, self.kwargs = layer, bias, args, kwargs
        self.weight = held_weight(layer)

    def __call__(self, x: Tensor, index: Tensor | None) -> Tensor:
        """x W0^T without b, [..., len(index)] for these rows of W0, [..., out] if None."""
        weight = self._seam()
        if index is not None and weight.has_rows:
            return F.linear(x, weight.rows(index).to(x.dtype))
        base = self.layer.base_layer
        plain = not self.args and not self.kwargs and base is self.layer.get_base_layer() and x.numel() > 0
        module, bias = linear_map(base, x.flatten(0, -2)) if plain and self.bias is not None else (base, self.bias)
        # as in the forward pass: some libraries compute otherwise if no gradient is needed, and repack their weight
        with torch.enable_grad():
            out = module(x.detach().requires_grad_(x.requires_grad), *self.args, **self.kwargs).detach()
        if bias is not None:
            wide = torch.promote_types(out.dtype, torch.float32)
            out = out.to(wide) - bias.to(wide)
        return out if index is None else out[..., index]

    def stored(self) -> object:
        """W0 as kernels read it, see `BaseWeight.stored`."""
        return self._seam().stored()

    def _seam(self) -> BaseWeight:
        if held_weight(self.layer) is not self.weight:
            raise changed_too_early(self.layer.name)
        return self.layer.base_weight()


def adapt_linear(
    layer: ComputingLayer,
    holder: Holder,
    adapter: str,
    how: choice.How,
    x: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> tuple[Tensor, Shortcut | None]:
    """The output of a linear layer with one adapter by our autograd function, and what the next pass may take."""
    if layer.magnitude_only[adapter]:
        return adapt_keeping_output(layer, adapter, how, x, args, kwargs), None
    weight = None if args or kwargs else dense_weight(layer)
    lora_A, lora_B = layer.factor_parameters(adapter)
    base_out = None if weight is not None else base_output(layer, x, args, kwargs)
    # after the call: some libraries round it to the dtype of x, for good
    bias = bias_of(layer)
    scaling, stored = float(layer.scaling[adapter]), layer.original_weight()
    by_kernels = norms.computes_by_kernels(lora_A, stored)
    known = norms.fresh(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels)
    if not layer.training and not torch.is_grad_enabled():
        if known is None:
            known, _, _ = norms.refreshed(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels)
        # on a device nothing is looked up, so there is nothing to fold beforehand
        if known.base is not None:
            return _evaluate(layer, holder, adapter, x, known, weight, bias, base_out)
    p = dropout_probability(layer, adapter)
    product = None if base_out is None else BaseProduct(layer, bias, args, kwargs)
    magnitude = layer.magnitude(adapter)
    options = options_for(x, lora_A, lora_B, magnitude, scaling, weight, base_out, product, p, layer._outputs)
    composed = z = None
    if known is None:
        sharing = None if weight is None else Sharing(weight, flattened(x), options.products, p > 0)
        known, composed, z = norms.refreshed_amid(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels, sharing)
    # m beside v, or c alone
    scale, norm = magnitude, known.value if layer.detach_norm[adapter] and divides_inside(magnitude, known) else None
    if norm is None:
        scale = scale_of(layer, adapter, differentiable=True, how=how, known=known)
    y = apply(x, base_out, bias, lora_A, lora_B, scale, weight, composed, options, product=z, norm=norm)
    return y, None if weight is None else shortcut_for(layer, holder, x, adapter, weight, options)


def _evaluate(
    layer: ComputingLayer,
    holder: Holder,
    adapter: str,
    x: Tensor,
    known: norms.Snapshot,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
) -> tuple[Tensor, Shortcut | None]:
    """`adapt_linear` in evaluation, for W0 or the base layer's output."""
    kept = norms.folded(layer, adapter, known)
    A = layer.factor_parameters(adapter)[0] if kept.lora_A is None else kept.lora_A
    options = options_for(x, A, kept.lora_B, kept.c, 1.0, weight, base_out, None, 0.0, None)
    y = linear_eval(
        x, A, kept.lora_B, kept.c, weight=weight, bias=bias, base_out=base_out, alpha=kept.alpha, options=options
    )
    return y, None if weight is None else shortcut_for(layer, holder, x, adapter, weight, options, kept)


class Linear(DoraLayer, nn.Module):
    """DoRA on a linear layer."""

    peft_layer = lora.Linear
    kind: Kind = LinearKind()

    def adapt_fast(
        self, adapter: str, how: choice.How, x: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Tensor:
        y, self._shortcut = adapt_linear(self, self, adapter, how, x, args, kwargs)
        return y

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.base_weight().has_rows and self.kind.merge_obstacle(self.get_base_layer()) is None

    def adapt_compiled(self, adapter: str, x: Tensor) -> Tensor | None:
        """The output by an operator, or with v in the graph; None if plain operations serve as well."""
        weight = dense_weight(self)
        if weight is None or self.magnitude_only[adapter] or drops_base(self, adapter):
            return None
        p = dropout_probability(self, adapter)
        if not choice.uses_kernels(x.device, x.dtype, weight.dtype):
            return self._composed_in_graph(adapter, x, weight) if p == 0 else None
        c = scale_of(self, adapter, differentiable=True, how="compiled")
        (lora_A, lora_B), scaling = self._factors_and_number(adapter)
        return linear_operator(x, weight, bias_of(self), lora_A, lora_B, c, scaling, p, self.number)

    def _composed_in_graph(self, adapter: str, x: Tensor, weight: Tensor) -> Tensor | None:
        """The output of a training pass that computes v itself, None where it is looked up."""
        factors, scaling = self._factors_and_number(adapter)
        magnitude = self.magnitude(adapter)
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or not self.detach_norm[adapter]:
            return None
        if not can_compose(weight, x, *factors, magnitude) or norms.traced_ties(self, adapter) is not None:
            return None
        composed, norm = composed_norm(weight, *factors, scaling)
        z = composed_product(x, *factors, weight, composed, scaling)
        return compose(z, scale(magnitude, norm, None), bias_of(self), x.dtype)

    def _factors_and_number(self, adapter: str) -> tuple[tuple[Tensor, Tensor], float]:
        """A, B and s, which prepare_model_for_compiled_hotswap makes a tensor: it goes into B then."""
        (lora_A, lora_B), scaling = self.factor_parameters(adapter), self.scaling[adapter]
        if isinstance(scaling, Tensor):
            return (lora_A, lora_B * scaling), 1.0
        return (lora_A, lora_B), scaling
