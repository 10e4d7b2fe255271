"""The linear layer by Triton kernels: forward and backward, in eager mode and as operators for torch.compile.

Per adapted layer at equal dtypes and without dropout, beside c = m / v:

    forward   x W0^T + b, x A^T, and one kernel that composes y in place over the first
    backward  one pass that reads g and y, writes g' = c * g and sums g (y - b); the magnitude's gradient from the sums;
              g'^T u, g' B, du^T x, g' W0, and du A accumulated into that

linear.py has the equations, and what is kept between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kept_output
from . import dropout as dropout_kernels
from . import linear as kernels
from .dropout import Seed

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    rows: Tensor,
    base_out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    scaling: float,
    seed: Seed | None,
    p: float,
) -> tuple[Tensor, Tensor, float]:
    """y [N, out], u = (mask * x) A^T [N, r] and k = s / (1 - p), for x [N, in] and `base_out` [N, out] or `weight`."""
    dtype = rows.dtype
    if seed is None:
        u, k = F.linear(rows, lora_A.to(dtype)), scaling
    else:
        kept = dropout_kernels.threshold(p)[1]
        u, k = dropout_kernels.dropped_product(rows, _rowwise(lora_A), seed, p), scaling / kept if kept else 0.0
    if weight is not None:
        z = out = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        assert base_out is not None
        z = _rowwise(base_out)
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
    return kernels.compose(z, u, _rowwise(lora_B), c, bias, k, out=out), u, k


def compose_folded(z: Tensor, u: Tensor, folded_B: Tensor, c: Tensor, bias: Tensor | None, *, in_place: bool) -> Tensor:
    """c * (z - b) + u folded_B^T + b for evaluation, over z where `in_place`."""
    z = _rowwise(z)
    return kernels.compose(z, u, _rowwise(folded_B), c, bias, None, out=z if in_place else torch.empty_like(z))


def gradients(
    g: Tensor,
    rows: Tensor,
    u: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    k: float,
    seed: Seed | None,
    p: float,
    needed: tuple[bool, ...],
    stored: Any,
    d_magnitude: Callable[[Tensor | None], Tensor],
    gone: Tensor | None = None,
) -> Gradients:
    """Gradients of x [N, in], base_out, bias, A, B and c; None for those that are not `needed`, in this order.

    Args:
        g: dL/dy [N, out].
        y: The layer's output, None where it was changed since.
        stored: W0 for `kernels.magnitude_gradient`, None where it is neither dense nor 4-bit.
        d_magnitude: Computes the gradient of c from sum_n g (y - b), None where y is, without kernels: where y is gone,
            or the base weight is no dense tensor.
        gone: A number [1] on the device that is not 0 if somebody wrote over y, see `kept_output.KeptOutput.read`.
    """
    need_x, need_base, need_bias, need_A, need_B, need_c = needed
    dtype = rows.dtype
    if y is not None:
        y = _rowwise(y)
    scaled, sums = kernels.scale_and_sum(g, c, y if need_c else None, bias)  # [N, out], [stripes, out]
    dx = d_bias = d_A = d_B = d_c = None
    if need_c:
        if sums is None or y is None or stored is None:
            overwritten = gone is not None and bool(gone)  # waits for the host, as all of this road does
            d_c = d_magnitude(None if sums is None or overwritten else sums.sum(0))
        else:
            d_c = kernels.magnitude_gradient(sums, g, y, rows, stored, u, _rowwise(lora_B), c, bias, k, gone)  # [out]
    if need_B:
        d_B = scaled.new_empty(lora_B.shape).addmm_(scaled.T, u, beta=0, alpha=k)  # [out, r]
    if need_A or need_x:
        du = torch.empty_like(u).addmm_(scaled, lora_B.to(dtype), beta=0, alpha=k)  # [N, r]
    if need_A:
        if seed is None:
            d_A = du.T @ rows  # [r, in]
        else:
            d_A = dropout_kernels.dropped_gradient(du, rows, seed, p, lora_A.dtype)
    if need_x:
        dx = None if weight is None else scaled @ weight.to(dtype)  # [N, in]
        if seed is not None:
            dx = dropout_kernels.add_low_rank(dx, du, _rowwise(lora_A), seed, p)
        else:
            dx = du @ lora_A.to(dtype) if dx is None else dx.addmm_(du, lora_A.to(dtype))
    if need_bias:
        d_bias = g.sum(0, dtype=c.dtype)
        if weight is None:  # the rest comes through base_out
            d_bias = (1 - c) * d_bias
    return dx, scaled if need_base else None, d_bias, d_A, d_B, d_c


def _rowwise(matrix: Tensor) -> Tensor:
    """The kernels step through these rows without a stride."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


# ---- operators for torch.compile, which sees through neither the kernels nor an autograd function that keeps y


@torch.library.custom_op("dora_peft::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    seed: Tensor | None,
    scaling: float,
    p: float,
    places: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, u, and what tells whether y was overwritten before backward: see `kept_output.sample`."""
    y, u, _ = forward(x.reshape(-1, x.shape[-1]), None, weight, bias, lora_A, lora_B, c, scaling, seed, p)
    return y.view(*x.shape[:-1], len(weight)), u, *kept_output.sample(y, places)


@_linear.register_fake
def _(x, weight, bias, lora_A, lora_B, c, seed, scaling, p, places):
    length, width = math.prod(x.shape[:-1]), weight.shape[0]
    rows, diagonal = kept_output.sample_sizes(length, width)
    return (
        x.new_empty(*x.shape[:-1], width),
        x.new_empty(length, lora_A.shape[0]),
        x.new_empty(rows, width),
        x.new_empty(diagonal),
    )


@torch.library.custom_op("dora_peft::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    y: Tensor,
    rows: Tensor,
    diagonal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    seed: Tensor | None,
    scaling: float,
    p: float,
    places: int,
    need_x: bool,
    need_bias: bool,
    need_A: bool,
    need_B: bool,
    need_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = 1.0 if seed is None else dropout_kernels.threshold(p)[1]
    gone = kept_output.differs(y, rows, diagonal, places)
    dx, _, d_bias, d_A, d_B, d_c = gradients(
        grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), u, y.reshape(-1, y.shape[-1]), weight, bias,
        lora_A, lora_B, c, scaling / kept if kept else 0.0, seed, p,
        (need_x, False, need_bias, need_A, need_B, need_c), weight, _never, gone,
    )  # fmt: skip
    none = c.new_empty(0)
    return (
        none if dx is None else dx.view(x.shape),
        none.clone() if d_bias is None or bias is None else d_bias.to(bias.dtype),
        none.clone() if d_A is None else d_A.to(lora_A.dtype),
        none.clone() if d_B is None else d_B.to(lora_B.dtype),
        none.clone() if d_c is None else d_c,
    )


def _never(_: Tensor | None) -> Tensor:
    raise AssertionError("the operators have y and a dense weight")


@_linear_backward.register_fake
def _(
    grad, x, u, y, rows, diagonal, weight, bias, lora_A, lora_B, c, seed, scaling, p, places,
    need_x, need_bias, need_A, need_B, need_c,
):  # fmt: skip
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else c.new_empty(0),
        torch.empty_like(bias) if need_bias else c.new_empty(0),
        torch.empty_like(lora_A, memory_format=torch.contiguous_format) if need_A else c.new_empty(0),
        torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_B else c.new_empty(0),
        torch.empty_like(c) if need_c else c.new_empty(0),
    )


def _keep(ctx, inputs, output):
    x, weight, bias, lora_A, lora_B, c, seed, ctx.scaling, ctx.p, ctx.places = inputs
    y, u, rows, diagonal = output
    ctx.save_for_backward(x, u, y, rows, diagonal, weight, bias, lora_A, lora_B, c, seed)
    ctx.mark_non_differentiable(u, rows, diagonal)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    need_x, _, need_bias, need_A, need_B, need_c = ctx.needs_input_grad[:6]
    needed = (need_x, need_bias, need_A, need_B, need_c)
    out = torch.ops.dora_peft.linear_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.p, ctx.places, *needed)
    dx, d_bias, d_A, d_B, d_c = (d if need else None for d, need in zip(out, needed, strict=True))
    return dx, None, d_bias, d_A, d_B, d_c, None, None, None, None


_linear.register_autograd(_backward, setup_context=_keep)
