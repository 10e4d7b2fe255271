"""Parts of the linear layer's two passes, by torch's operations; linear_autograd.py has the equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases.input_gradient import differentiated_twice
from .chunks import does_one_pass, in_chunks, in_one_pass
from .constants import DROWNED, TINY


def run_backward(ctx, grad, gradients):
    """What `gradients(ctx, grad)` gives, the last of it for m if the forward pass got v beside m instead of c.

    Raises:
        RuntimeError: Asked for second derivatives, or W0 was changed in place since the forward pass of this context.
    """
    if torch.is_grad_enabled():
        raise differentiated_twice()
    weight = ctx.weight
    if weight is not None and ctx.weight_version is not None and weight._version != ctx.weight_version:
        raise RuntimeError(
            "A base weight was changed in place between the forward and the backward pass that needs it "
            f"(shape {list(weight.shape)}). Change base weights before the forward pass, or after backward."
        )
    if not torch.is_autocast_enabled(grad.device.type):
        *others, d_c = gradients(ctx, grad)
    else:
        with torch.autocast(grad.device.type, enabled=False):
            *others, d_c = gradients(ctx, grad)
    if ctx.norm is not None and d_c is not None:
        # that of m = c v
        d_c = d_c / ctx.norm
    return *others, d_c


def z_at(ctx, x, u, lora_B, c, index):
    """x W0^T + s u B^T [N, len(index)] at columns `index`, at all if None."""
    rows = flattened(x).to(ctx.dtype)
    if ctx.weight is not None:
        weight = ctx.weight if index is None else ctx.weight[index]
        z = F.linear(rows, weight.to(ctx.dtype))
    else:
        lowered = ctx.options.autocast_dtype
        with torch.autocast(x.device.type, lowered, enabled=lowered is not None):
            z = flattened(ctx.options.base_product(x, index))
    B = lora_B if index is None else lora_B[index]
    return torch.addmm(z.to(c.dtype), u.to(c.dtype), B.to(c.dtype).T, alpha=ctx.k)


def flattened(x: Tensor) -> Tensor:
    """[..., features] as [N, features]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes a microsecond even if there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def scale_and_sum(
    g: Tensor,
    c: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor],
    *,
    keep_scaled: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over g [N, out], of many tokens a few at a time: g' = c * g, its product with W0, and sum_n g (y - b).

    Returns:
        g' W0 [N, in] if `weight` is given, g' [N, out] if `keep_scaled` or if it was made as a whole without loss, and
        the sums [out] if y [..., out] is given.
    """
    y = None if y is None else flattened(y)
    scales = keep_scaled or weight is not None
    if y is not None and does_one_pass(g, c, y, bias, scale=scales):
        scaled, sums = in_one_pass(g, c, y, bias, scale=scales)
        return None if scaled is None or weight is None else multiply(scaled, weight.T), scaled, sums
    return in_chunks(g, c, y, bias, weight, multiply, keep_scaled)


def magnitude_gradient(
    sums: Tensor | None,
    g: Tensor,
    y: Tensor | None,
    c: Tensor,
    bias: Tensor | None,
    z_at: Callable[[Tensor | None], Tensor],
) -> Tensor:
    """dc_j = sum_n g_nj z_nj [out], with z = (y - b) / c if y still determines z and from `z_at(columns)` otherwise.

    Args:
        sums: sum_n g (y - b), None if y is.
        y: The layer's output [..., out], None if it was changed since.
        z_at: Computes z [N, len(index)] at columns `index`, [N, out] if that is None.
    """
    if y is None or sums is None:
        return (g * z_at(None)).sum(0)
    tiny, most = TINY[y.dtype], None
    if bias is not None and y.numel():
        # the rounding of y = c z + b against the size of c z, on a sample of the tokens; that of most of them, since
        # the first token is often far larger than all others
        sample = (flattened(y)[:: max(1, len(g) // 64)] - bias).to(c.dtype)
        # [out], at most 0 if b drowns half of the sample or more
        most = torch.sub(sample.abs(), bias.abs(), alpha=DROWNED[y.dtype]).sign_().sum(0)
    # two numbers are read faster than a comparison is made; c is seldom negative
    certain = not len(c) or float(c.min()) >= tiny or float(c.abs().min()) >= tiny
    if certain and (most is None or float(most.min()) > 0):
        return sums / c
    lost = c.abs() < tiny
    index = (lost if most is None else lost | ((most <= 0) & (bias != 0))).nonzero()[:, 0]
    if not len(index):
        return sums / c
    exact = (g[:, index] * z_at(index)).sum(0)
    return (sums / c.index_fill(0, index, 1)).index_copy_(0, index, exact)
