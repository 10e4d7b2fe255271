"""The forward pass of a linear layer that computes as it did last time.

What decides how a layer computes is put into one key: whose weight, which adapter, which implementation, with gradients
or without. If the key is that of the last pass, nothing is decided again, and the layer goes straight to the check of
its norm and to the product: decoding calls each layer for one token at a time, and training on short batches for few.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import norms
from ..bases.inspection import GLOBAL_HOOKS
from ..ops import choice, torch_names
from ..ops.constants import LOW_PRECISION
from ..ops.linear import linear_eval
from ..ops.linear_autograd import apply, flattened
from ..ops.norm import Sharing, scale
from ..ops.options import Options
from .kind import ComputingLayer
from .magnitude import Magnitude


class Holder(Protocol):
    """The module whose tensors an adapted layer computes with: a DoraLayer itself, or PEFT's layer behind a view."""

    training: bool
    merged_adapters: list[str]
    _active_adapter: str | list[str]
    _disable_adapters: bool
    _modules: dict[str, nn.Module | None]


# Key, A, B and m.
Found = tuple[tuple[object, ...], nn.Parameter, nn.Parameter, nn.Parameter]


def key_of(layer: ComputingLayer, holder: Holder, x: Tensor, adapter: str) -> Found | None:
    """All that decides how a pass of x through `layer` with this adapter is computed, and A, B and m as stored.

    Objects stand in the key by their identity, for which a shortcut keeps them alive.

    Returns:
        None if the adapter, one of the tensors or the bias as a parameter is not there, or if a transform or another
        mode is at work, whose tensors are not those that the layer holds.
    """
    if torch_names.modes() or torch_names.transforming() or torch_names.jit_state() is not None:
        return None
    modules, active, base = holder._modules, holder._active_adapter, layer.base_layer
    try:
        to_rank: nn.Module = modules["lora_A"]._modules[adapter]  # type: ignore[union-attr, assignment]
        from_rank: nn.Module = modules["lora_B"]._modules[adapter]  # type: ignore[union-attr, assignment]
        own: nn.Module = modules["lora_magnitude_vector"]._modules[adapter]  # type: ignore[union-attr, assignment]
        added = to_rank._parameters["bias"] is not None or from_rank._parameters["bias"] is not None
        # a computed one is no parameter
        lora_A, lora_B = to_rank._parameters["weight"], from_rank._parameters["weight"]
        magnitude = own._parameters["weight"]
        dropout, weight, bias = layer.lora_dropout[adapter], base._parameters["weight"], base._parameters["bias"]
    except KeyError:
        return None
    if lora_A is None or lora_B is None or magnitude is None or type(weight) is not nn.Parameter:
        return None
    device = x.device.type
    key = (
        active if type(active) is str else tuple(active),
        holder._disable_adapters,
        bool(holder.merged_adapters),
        torch.is_grad_enabled(),
        choice.selected,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        x.dtype,
        magnitude.dtype,
        type(base).forward,
        "forward" in base.__dict__,
        # with any of them a pass leaves no shortcut
        bool(base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks),
        id(weight), weight.data_ptr(), weight.requires_grad, id(bias),
        layer.detach_norm[adapter], layer.dropout_mode[adapter],
        # with dropout's mode that of the layer, see called.py
        type(dropout), vars(dropout).get("p", 0.0), dropout.training,
        # the modules, whose hooks a shortcut asks for
        dropout, to_rank, from_rank, own, added,
        type(to_rank).forward, type(from_rank).forward, type(own).forward,
    )  # fmt: skip
    return key, lora_A, lora_B, magnitude


class Shortcut:
    """What a pass was decided to be, for as long as its key is that of the next one.

    Args:
        found: What `key_of` gave for the pass.
        adapter: The one active adapter.
        layer: The layer, over a dense base weight.
        weight: W0 [out, in] as it is multiplied by.
        options: As of `linear_autograd.apply` and `linear_eval`.
        folded: What evaluation multiplies by, None in training.
    """

    def __init__(
        self,
        found: Found,
        adapter: str,
        layer: ComputingLayer,
        weight: Tensor,
        options: Options,
        folded: norms.Folded | None = None,
    ) -> None:
        self.key, self.adapter, self.folded = found[0], adapter, folded
        self.base, self.weight, self.options = layer.base_layer, weight, options
        self.stored, self.bias = self.base.get_parameter("weight"), self.base._parameters["bias"]
        self.by_kernels = norms.computes_by_kernels(found[1], self.stored)
        factors, own = layer.factor_modules(adapter), layer.lora_magnitude_vector[adapter]
        self.attributes = [vars(module) for module in (*factors, own, layer.lora_dropout[adapter])]

    def __call__(self, layer: ComputingLayer, holder: Holder, x: Tensor) -> Tensor | None:
        """The output for x, None if something has changed since."""
        adapter, options = self.adapter, self.options
        # what has to be called is not read, see called.py
        if any(GLOBAL_HOOKS):
            return None
        for held in self.attributes:
            if held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held:
                return None
            if held["_backward_hooks"] or held["_backward_pre_hooks"]:
                return None
        found = key_of(layer, holder, x, adapter)
        if found is None or found[0] != self.key:
            return None
        _, lora_A, lora_B, magnitude = found
        scaling, stored, by_kernels = layer.scaling[adapter], self.stored, self.by_kernels
        if isinstance(scaling, Tensor):
            # since the last pass: what compares it with itself would see no change
            return None
        known = norms.fresh(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels)
        kept = self.folded
        if kept is not None:
            if known is None or kept.known is not known or not kept.magnitude.fits(magnitude):
                return None
            cast_A = lora_A if kept.lora_A is None else kept.lora_A
            return linear_eval(
                x, cast_A, kept.lora_B, kept.c, weight=self.weight, bias=self.bias, alpha=kept.alpha, options=options
            )
        composed = product = None
        if known is None:
            sharing = Sharing(self.weight, flattened(x), options.products, options.dropout_p > 0)
            known, composed, product = norms.refreshed_amid(
                layer, adapter, lora_A, lora_B, scaling, stored, by_kernels, sharing
            )
        if options.scaling != scaling:
            options = self.options = replace(options, scaling=scaling)
        c: Tensor = magnitude
        norm = known.value if divides_inside(magnitude, known) else None
        if norm is None:
            c = scale(magnitude.view(-1), known.value, known.tied)
        return apply(x, None, self.bias, lora_A, lora_B, c, self.weight, composed, options, product=product, norm=norm)


def divides_inside(magnitude: Tensor, known: norms.Snapshot) -> bool:
    """Whether `apply` gets m and v, not c, if v has no gradient. Checkpointing counts what either road keeps, so that
    all passes of a layer have to go the same."""
    return known.tied is None and magnitude.dim() == 1


def _asked(holder: Holder, adapter: str) -> bool:
    """Whether the magnitude has its dtype on request."""
    magnitude = holder._modules["lora_magnitude_vector"]._modules[adapter]  # type: ignore[union-attr]
    return isinstance(magnitude, Magnitude) and magnitude.asked is magnitude.weight.dtype


def shortcut_for(
    layer: ComputingLayer,
    holder: Holder,
    x: Tensor,
    adapter: str,
    weight: Tensor,
    options: Options,
    folded: norms.Folded | None = None,
) -> Shortcut | None:
    """What the next pass may take, None if it has to decide again."""
    found = key_of(layer, holder, x, adapter)
    # what a captured graph's pass took may not be what the next one takes
    if found is None or not choice.is_decided(x.device):
        return None
    # after prepare_model_for_compiled_hotswap
    if isinstance(layer.scaling[adapter], Tensor):
        return None
    # magnitudes in low precision are looked at in each pass, unless that was asked for, see magnitude.py; evaluation
    # trains nothing
    if folded is None and (
        not layer.detach_norm[adapter] or (found[3].dtype in LOW_PRECISION and not _asked(holder, adapter))
    ):
        return None
    return Shortcut(found, adapter, layer, weight, options, folded)
