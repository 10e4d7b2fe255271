"""The output of any adapted layer: the base layer's product, what is composed with it, and what backward keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..bases import input_gradient, offload
from ..bases.inspection import has_global_hooks, linear_map
from ..ops import choice
from ..ops.compose import as_now, compose, compose_keeping_output, compose_paper
from ..ops.content import version
from . import called
from .kind import ComputingLayer
from .scale import scale_of


class MixedLayer(ComputingLayer, Protocol):
    """What holds several adapters at once, see `DoraLayer`."""

    merged_adapters: list[str]
    lora_magnitude_vector: nn.ModuleDict


Arguments = tuple[object, ...]
Keywords = Mapping[str, object]


def adapt_plainly(
    layer: ComputingLayer, adapters: list[str], how: choice.How, x: Tensor, args: Arguments, kwargs: Keywords
) -> Tensor:
    """The output of the layer with adapters composed in this order, by plain operations."""
    z, dtype = base_product(layer, x, args, kwargs)
    for adapter in adapters:
        z = adapt(layer, adapter, how, x, z, bias_of(layer) if adapter == adapters[-1] else None, dtype)
    return z


def adapt(
    layer: ComputingLayer,
    adapter: str,
    how: choice.How,
    x: Tensor,
    z: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """c * (z + s B A x) + b in `dtype`, for z without b: a rounded output with b may have lost what m needs."""
    calls = called.has_to_call(layer, adapter)
    low_rank = magnitude = None
    with called.computed_once(calls):
        dropped = _dropped(layer, adapter, called.as_input(layer, adapter, x) if calls else x)
        if calls:
            low_rank = _called_branch(layer, adapter, dropped).to(z.dtype)
            magnitude = called.magnitude(layer, adapter)
        elif not layer.magnitude_only[adapter]:
            factors = layer.factor_parameters(adapter)
            low_rank = layer.kind.low_rank(layer, dropped, *factors, layer.scaling[adapter]).to(z.dtype)
        # of the weights that the calls have left
        c = scale_of(layer, adapter, differentiable=True, how=how, magnitude=magnitude)
    c = layer.kind.per_channel(layer.get_base_layer(), c)
    if drops_base(layer, adapter):
        return compose_paper(z, base_product(layer, dropped.to(x.dtype), (), {})[0], low_rank, c, bias, dtype)
    return compose(z if low_rank is None else z + low_rank, c, bias, dtype)


def _called_branch(layer: ComputingLayer, adapter: str, dropped: Tensor) -> Tensor:
    """s B A x by calling the modules of A and B; of an embedding, whose factors are no modules, by their values now."""
    scaling = layer.scaling[adapter]
    if layer.kind.calls:
        return called.branch(layer, adapter, dropped) * scaling
    called.write_weights(*layer.factor_modules(adapter))
    return layer.kind.low_rank(layer, dropped, *layer.factor_parameters(adapter), scaling)


def adapt_mixed(layer: MixedLayer, x: Tensor, names: object, args: Arguments, kwargs: Keywords) -> Tensor:
    """The output for samples of several adapters, without gradients.

    Args:
        names: A list with the adapter of each sample, "__base__" for none.

    Raises:
        ValueError: Not as many names as samples, or an adapter is merged.
    """
    adapter_names = names if isinstance(names, (list, tuple)) else []
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if layer.merged_adapters:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    how = choice.decide(x.device, x.dtype)
    z, dtype = base_product(layer, x, args, kwargs)
    for adapter in sorted(set(adapter_names)):
        # "__base__" is none of these
        if adapter not in layer.lora_magnitude_vector:
            continue
        index = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=z.device)
        z = z.index_copy(0, index, adapt(layer, adapter, how, x[index.to(x.device)], z[index], None, z.dtype))
    bias = bias_of(layer)
    return (z if bias is None else z + bias).to(dtype)


def adapt_keeping_output(
    layer: ComputingLayer, adapter: str, how: choice.How, x: Tensor, args: Arguments, kwargs: Keywords
) -> Tensor:
    """The output of the layer with one adapter, keeping less for the backward pass than `adapt` does."""
    if not torch.is_grad_enabled():
        return adapt_plainly(layer, [adapter], how, x, args, kwargs)
    product, scaling = _pinned_product(layer, args, kwargs), float(layer.scaling[adapter])
    needed = [x]
    if not layer.magnitude_only[adapter]:
        needed += [_dropped(layer, adapter, x), *layer.factor_parameters(adapter)]

    def add_branch(z: Tensor, *branch: Tensor) -> Tensor:
        if not branch:
            return z
        dropped, lora_A, lora_B = branch
        return z + layer.kind.low_rank(layer, dropped, lora_A, lora_B, scaling).to(z.dtype)

    def before_scaling(x: Tensor, *branch: Tensor) -> Tensor:
        return add_branch(product(x)[0], *branch)

    # before v is asked for: the call may compute the base weight again, as weight_norm's hook does
    z, dtype = product(x)
    z = add_branch(z, *needed[1:])
    c = layer.kind.per_channel(layer.get_base_layer(), scale_of(layer, adapter, differentiable=True, how=how))
    again = as_now(before_scaling, x.device.type)
    return compose_keeping_output(z, c, bias_of(layer), dtype, again, layer._outputs, *needed)


def _dropped(layer: ComputingLayer, adapter: str, x: Tensor) -> Tensor:
    """The input of the low-rank branch."""
    return layer.lora_dropout[adapter](x) if layer.kind.drops else x


def dropout_probability(layer: ComputingLayer, adapter: str) -> float:
    """With which probability an element of the low-rank branch's input is dropped now."""
    dropout = layer.lora_dropout[adapter]
    return dropout.p if layer.training and layer.kind.drops and isinstance(dropout, nn.Dropout) else 0.0


def drops_base(layer: ComputingLayer, adapter: str) -> bool:
    """Whether the paper's dropout is at work, which needs a second base product and keeps an intermediate of it."""
    return layer.dropout_mode[adapter] == "paper" and dropout_probability(layer, adapter) > 0


def may_differ_again(layer: ComputingLayer) -> bool:
    """Whether to keep what plain operations keep: to compute the base output again might give another one.

    Hooks of the user's may draw random numbers, count, or be gone by then. So may the forward of a subclass.
    """
    base = layer.base_layer
    watched = bool(base._forward_hooks or base._forward_pre_hooks) or has_global_hooks()
    return watched or layer.kind.computes_otherwise(base)


def base_product(layer: ComputingLayer, x: Tensor, args: Arguments, kwargs: Keywords) -> tuple[Tensor, torch.dtype]:
    """x W0^T without b, in the shape of the output, and the dtype of the output.

    If the base layer gives it with b only, b is subtracted in fp32, which cannot bring back what was rounded.
    """
    weight = None if args or kwargs else dense_weight(layer)
    if weight is not None:
        z = layer.kind.multiply(layer.get_base_layer(), x, weight)
        return z, z.dtype
    bias = bias_of(layer)
    if bias is not None and not args and not kwargs and (twin := _without_bias(layer, x)) is not None:
        out = twin(x)
        return out, out.dtype
    out = base_output(layer, x, args, kwargs)
    if bias is None:
        return out, out.dtype
    wide = torch.promote_types(out.dtype, torch.float32)
    return out.to(wide) - bias.to(wide), out.dtype


def _without_bias(layer: ComputingLayer, x: Tensor) -> nn.Module | None:
    """What computes the base layer's product without its bias, None if the layer itself has to be called."""
    base = layer.base_layer
    if torch.compiler.is_compiling() or choice.tracing() or base is not layer.get_base_layer() or not x.numel():
        return None
    if torch.is_grad_enabled() and not input_gradient.gives_gradient(base):
        return None
    module, bias = linear_map(base, x)
    return module if bias is None else None


def base_output(layer: ComputingLayer, x: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
    """What the base layer gives, with the right gradient for x. Not to be changed in place."""
    base = layer.get_base_layer()
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not input_gradient.gives_gradient(base):
        return input_gradient.call(layer.base_layer, layer.base_weight, x, *args, **kwargs)
    return layer.base_layer(x, *args, **kwargs)


def _pinned_product(
    layer: ComputingLayer, args: Arguments, kwargs: Keywords
) -> Callable[[Tensor], tuple[Tensor, torch.dtype]]:
    """`base_product` of x by the base weight of this moment: a backward pass may come after it was exchanged."""
    weight = None if args or kwargs else dense_weight(layer)
    if weight is not None:
        before, base = version(weight), layer.get_base_layer()

        def multiply(x: Tensor) -> tuple[Tensor, torch.dtype]:
            if version(weight) != before:
                raise changed_too_early(layer.name)
            z = layer.kind.multiply(base, x, weight)
            return z, z.dtype

        return multiply
    stored = held_weight(layer)

    def call(x: Tensor) -> tuple[Tensor, torch.dtype]:
        if held_weight(layer) is not stored:
            raise changed_too_early(layer.name)
        return base_product(layer, x, args, kwargs)

    return call


def held_weight(layer: ComputingLayer) -> nn.Parameter | None:
    """The weight parameter that the base layer holds; None if it is computed, offloaded, or kept in parts."""
    weight = layer.get_base_layer()._parameters.get("weight")
    return None if weight is None or weight.is_meta else weight


def dense_weight(layer: ComputingLayer) -> Tensor | None:
    """W0 if the base layer does nothing but multiply by it, so that `Kind.multiply` may stand for its forward: no
    subclass with another forward, no hooks (offloading), no tensor subclass, nothing trained."""
    base = layer.base_layer
    if not layer.kind.multiplies(base, type(base).forward) or "forward" in base.__dict__:
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    if has_global_hooks():
        return None
    weight = base._parameters.get("weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter):
        return None
    if weight.requires_grad or not weight.is_floating_point():
        return None
    return layer.kind.oriented(base, weight)


def bias_of(layer: ComputingLayer) -> Tensor | None:
    """b in the shape that broadcasts against the layer's output."""
    base = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    if bias is not None and bias.is_meta:
        bias = offload.read(base, "bias")
    return None if bias is None else layer.kind.per_channel(base, bias)


def changed_too_early(name: str) -> RuntimeError:
    """What to raise in a backward pass that needs a base weight which is gone."""
    return RuntimeError(
        f"The base weight of module '{name}' was changed between the forward and the backward pass that needs it. "
        "Change base weights before the forward pass, or after backward."
    )
