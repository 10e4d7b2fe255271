"""The gradient with respect to x of a base layer that gives none, or a wrong one.

torchao's int8 weights with dynamically quantised activations have no derivative: the adapter would train with the
low-rank branch's part of dL/dx alone, off by over 100 % in the layers below. Quantising x is rounding, and the gradient
over the dequantised weight, g W0, is the usual straight-through estimate.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .base import BaseWeight
from .inspection import compute_dtype, linear_map

# How far the gradient of ||W0 x||^2 / 2 along x may be from ||W0 x||^2; quantised activations are off by 1 %.
TOLERANCE = 0.2
_known: weakref.WeakKeyDictionary[nn.Module, tuple[type, bool]] = weakref.WeakKeyDictionary()


def gives_gradient(layer: nn.Module) -> bool:
    """Whether autograd through a linear base layer gives dL/dx = g W0.

    True at once for a plain weight and for bitsandbytes' layers. Others are tried, once per layer and type of weight.

    Args:
        layer: The base layer itself, as `get_base_layer()` gives it.
    """
    weight = layer._parameters.get("weight")
    kind = type(weight)
    if kind is nn.Parameter or kind.__name__ in ("Params4bit", "Int8Params"):
        return True
    known = _known.get(layer)
    if known is None or known[0] is not kind:
        known = _known[layer] = (kind, _try(layer))
    return known[1]


def _try(layer: nn.Module) -> bool:
    """For y = W0 x + b: the gradient of y along z = W0 x is W0^T z, and x . W0^T z = ||z||^2."""
    in_features = getattr(layer, "in_features", None)
    tensors = [*layer.parameters(), *layer.buffers()]
    if in_features is None or not tensors or tensors[0].is_meta:
        # nothing to try it with
        return True
    device = tensors[0].device
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        dtype = weight.dtype
    else:
        dtype = compute_dtype(layer, in_features)
    x = torch.linspace(0, in_features, in_features, dtype=torch.float64).add(1).sin()[None]
    x = x.to(device, dtype).requires_grad_()
    # The innermost hooks alone see what is saved here: a checkpoint around the layer, which counts it, must not.
    apart = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), apart:
        module, bias = linear_map(layer, x)
        y = module.forward(x.clone())
        z = (y if bias is None else y - bias).detach()
        if not y.requires_grad:
            return False
        try:
            (grad,) = torch.autograd.grad(y, x, z.to(y.dtype), allow_unused=True)
        # a product without a derivative
        except RuntimeError:
            return False
    if grad is None:
        return False
    expected = z.double().square().sum()
    return bool(((grad.double() * x.detach().double()).sum() - expected).abs() <= TOLERANCE * expected)


def differentiated_twice() -> RuntimeError:
    """What a backward pass raises that is itself recorded: its gradients would be constants in that graph."""
    return RuntimeError(
        "Differentiating twice through a DoRA layer (create_graph=True) needs an output by plain operations. Compute "
        'the forward pass inside `with dora_peft.implementation("reference"):`, or leave create_graph out.'
    )


class _OverWeight(torch.autograd.Function):
    """y = layer(x) as given, with dx = g W0."""

    @staticmethod
    def forward(ctx, x, y, seam):
        ctx.seam, ctx.shape, ctx.dtype = seam, x.shape, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise differentiated_twice()
        dx = None
        if ctx.needs_input_grad[0]:
            weight = ctx.seam()
            with torch.autocast(grad.device.type, enabled=False):
                # [N, out]
                flat = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
                # [N, in] -> [..., in]
                dx = weight.vjp(flat.T).to(ctx.dtype).view(ctx.shape)
        return dx, grad, None


def call(layer: nn.Module, seam: Callable[[], BaseWeight], x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """layer(x, ...) with a gradient for x; equals `layer(x)` if `gives_gradient(layer)`.

    Args:
        layer: What computes the base output: the base layer, or a wrapper around it.
        seam: Gives the `BaseWeight` of it, in backward.
        x: [..., in].
        args, kwargs: What else the layer is called with.

    Returns:
        [..., out], as the layer gives it. Not a fresh tensor: it must not be changed in place.
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        return layer(x, *args, **kwargs)
    return _OverWeight.apply(x, layer(x.detach(), *args, **kwargs), seam)
