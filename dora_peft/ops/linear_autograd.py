"""DoRA's linear layer as one autograd function: forward, backward, and what is kept between them.

    u = drop(x) A^T                      [N, r]
    y = c * (x W0^T + s u B^T) + b       [N, out]

LoRA's eager layer makes a product, a scaled copy and a sum of it, each [N, out]; here the base product is scaled and
the low-rank product accumulated into it, in place. For many tokens and without dropout even that is more than composing
the weight: y = x (c (W0 + s B A))^T + b, and dx from the same matrix, which is made twice and never kept, or from c W0
and du A where there are fewer tokens than rows of W0. Kept for the backward pass are

    x    shared with every other layer that reads it, in its dtype
    y    the layer's *output*, which the next operation often keeps anyway, instead of an intermediate
    u    [N, r], and with dropout one byte an element of x, on a GPU its seed alone

The price of keeping y: if it no longer determines what the magnitude's gradient needs, that is computed again from x.
This happens for rows with c = 0, for rows whose bias drowns the rest in rounding, and if somebody wrote over y, which
ops/kept_output.py finds out by its content.

Everything runs in the base's compute dtype: the small A and B are cast, x and W0 never are (but by autocast). c, b and
all sums over tokens are fp32 (fp64 for an fp64 base).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_by_kernels
from .content import version
from .dropout import dropout_mask
from .kept_output import KeptOutput
from .linear_parts import flattened, in_dtype, magnitude_gradient, run_backward, scale_and_sum, z_at
from .options import Options
from .products import compose_weight, multiply_many, times_transposed
from .scaled_sum import scaled_sum
from .torch_names import unsafe_view
from .workspace import workspace


def apply(
    x: Tensor,
    base_out: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    weight: Tensor | None,
    composed: Tensor | None,
    options: Options,
    *,
    product: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """`linear` with what is no tensor decided already.

    Args:
        composed: W0 + s B A [out, in], if it has just been made: it is overwritten.
        product: x W0^T [N, out], if it has just been made.
        norm: v [out], if m is given in the place of c: a division outside of the function takes 15 us a step.
    """
    if options.kernels is not None:
        return linear_by_kernels.apply(x, base_out, bias, lora_A, lora_B, c, weight, options, norm)
    if options.autocast_dtype is None:
        return _Linear.apply(x, base_out, bias, lora_A, lora_B, c, weight, composed, product, options, norm)
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(x, base_out, bias, lora_A, lora_B, c, weight, None, None, options, norm)


class _Linear(torch.autograd.Function):
    """With g = dL/dy, u = drop(x) A^T, k = s / (1 - p):

    g' = c * g          du = g (k c * B)          dx = g' W0 + mask * (du A)
    dA = du^T (mask * x)          dB = k c * (g^T u)          dc_j = sum_n g_nj (y_nj - b_j) / c_j
    """

    @staticmethod
    def forward(ctx, x, base_out, bias, lora_A, lora_B, c, weight, composed, product, options, norm):
        dtype, k, p = options.dtype, options.scaling, options.dropout_p
        if norm is not None:
            c = c / norm
        # [N, in]
        rows, mask = in_dtype(flattened(x), dtype), None
        products, count = options.products, len(rows)
        if p > 0:
            mask, kept = dropout_mask(rows.shape, p, rows.device)
            k = k / kept if kept else 0.0
        multiply_in = multiply_many if count >= products.thin_in else F.linear
        # [N, r]
        u = multiply_in(rows if mask is None else rows * mask, in_dtype(lora_A, dtype))
        multiply = multiply_many if count >= products.wide else F.linear
        if mask is None and composed is None and product is None and count >= products.composed:
            composed = compose_weight(weight, lora_A, lora_B, k)
        if composed is not None:
            y = multiply(rows, composed.mul_(c[:, None]), bias)
        elif product is not None:
            y = torch.mul(product, c) if bias is None else torch.addcmul(bias, product, c)
            y.addmm_(u, (lora_B * c[:, None]).T, alpha=k)
        elif weight is not None:
            z = multiply(rows, in_dtype(weight, dtype), None if bias is None else in_dtype(bias, dtype))
            y = scaled_sum(z, u, lora_B * c[:, None], c, bias, out=z, alpha=k)
        else:
            z = flattened(base_out)
            y = scaled_sum(z, u, lora_B * c[:, None], c, bias, out=torch.empty_like(z), alpha=k)
        if x.dim() != 2:
            y = unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        ctx.kept, saved = None, []
        if ctx.needs_input_grad[5]:
            ctx.kept = KeptOutput(y, options.outputs)
            saved, ctx.kept.saved = ctx.kept.saved, []
        ctx.save_for_backward(x, u, mask, bias, lora_A, lora_B, c, *saved)
        # not among the saved tensors: offloading would move W0 with them
        ctx.weight, ctx.options, ctx.k, ctx.dtype, ctx.norm = weight, options, k, y.dtype, norm
        ctx.weight_version = version(weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        return *run_backward(ctx, grad, _by_torch), None, None, None, None, None


def _by_torch(ctx, grad):
    """The gradients of x, base_out, bias, A, B and c by torch's operations."""
    x, u, mask, bias, lora_A, lora_B, c, *kept = ctx.saved_tensors
    need_x, need_base, need_bias, need_A, need_B, need_c = ctx.needs_input_grad[:6]
    k, dtype, products = ctx.k, ctx.dtype, ctx.options.products
    # [N, out], [N, in] and [out, in]
    g, rows, weight = flattened(grad), in_dtype(flattened(x), dtype), ctx.weight
    weight, count = None if weight is None else in_dtype(weight, dtype), len(g)
    multiply = multiply_many if count >= products.wide else F.linear
    composes = need_x and count >= products.composed and g.dtype is weight.dtype
    y = _kept_output(ctx, kept, grad)[0] if need_c else None
    sums = d_bias = d_A = d_B = d_c = None
    through = weight if need_x and not composes else None
    dx, scaled, sums = scale_and_sum(g, c, y, bias, through, multiply, keep_scaled=need_base)
    if need_c:
        d_c = magnitude_gradient(sums, g, y, c, bias, partial(z_at, ctx, x, u, lora_B, c))
    # g' in low precision has lost digits that B and A need
    exact = scaled if dtype is c.dtype else None
    if need_B:
        # [out, r], in c's dtype
        factor = (k * c)[:, None] if exact is None else k
        d_B = times_transposed(u, g if exact is None else exact).T * factor
    if (need_A or need_x) and (exact is None or count >= products.thin_out):
        # [N, r]
        multiply_out = multiply_many if count >= products.thin_out else F.linear
        du = multiply_out(g, in_dtype(lora_B * (k * c)[:, None], dtype).T)
    elif need_A or need_x:
        du = torch.addmm(u, exact, in_dtype(lora_B, dtype), beta=0, alpha=k)
    if need_A:
        # [r, in]
        d_A = times_transposed(du, rows if mask is None else rows * mask)
    if need_x:
        # du A costs fewer multiplications than B A if there are fewer tokens than rows of B
        apart = not composes or mask is not None or count < len(weight)
        if composes:
            dx = multiply(g, _composed(weight, lora_A, lora_B, c, k, apart).T)
        if apart:
            dx = _add_low_rank(dx, du, in_dtype(lora_A, dtype), mask)
        dx = dx if x.dim() == 2 else dx.view(x.shape)
    if need_bias:
        d_bias = g.sum(0, dtype=c.dtype)
        # without `weight` the rest comes through base_out
        d_bias = (1 - c) * d_bias if weight is None else d_bias
    return dx, scaled.view(grad.shape) if need_base else None, d_bias, d_A, d_B, d_c


def _composed(weight: Tensor, lora_A: Tensor, lora_B: Tensor, c: Tensor, k: float, apart: bool) -> Tensor:
    """c (W0 + s B A) [out, in], for this thread until the next call; c W0 if B A is multiplied by `apart` from it, as
    under dropout, whose mask is another for each token."""
    if apart:
        return torch.mul(weight, c[:, None], out=workspace("composed", tuple(weight.shape), c))
    return compose_weight(weight, lora_A, lora_B, k).mul_(c[:, None])


def _add_low_rank(dx: Tensor | None, du: Tensor, lora_A: Tensor, mask: Tensor | None) -> Tensor:
    """dx + mask * (du A) [N, in]."""
    if mask is None:
        return du @ lora_A if dx is None else dx.addmm_(du, lora_A)
    low_rank = (du @ lora_A).mul_(mask)
    return low_rank if dx is None else dx.add_(low_rank)


def _kept_output(ctx, saved, grad):
    """y [..., out], None if it was overwritten, and what the device has to say about that, see `KeptOutput.read`."""
    kept = ctx.kept
    if kept is None:
        return None, None
    # the usual case of `KeptOutput.read`, here so that backward stays in one file: keep both alike
    y = kept.alias
    if kept.address and y._version == kept.version and y.untyped_storage().data_ptr() == kept.address:
        shared = grad.untyped_storage().data_ptr() == kept.address
        if not shared and not kept.differing_rows() and kept.equal_diagonal():
            # y goes as the saved tensors do; a second pass over the graph computes it again
            kept.alias, kept.address, kept.equal_diagonal = None, 0, bool
            return y, None
    return kept.read(saved, grad)
