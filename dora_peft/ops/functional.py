"""What the layers compute, without any [out, in] temporary: norm, scale and composition.

`weight` is a `base_weight.BaseWeight` here, the seam through which dense, quantised and grouped weights look alike.
The equations and symbols are those of reference.py; linear layers have their own function in linear.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import norm_kernels
from .constants import CANCELLATION, drowned, tiny
from .kept_output import KeptOutput, Outputs
from .linear import compose_weight

if TYPE_CHECKING:
    from ..bases import BaseWeight

# Rows of W0 + s B A that the norm makes at a time on a CPU: larger temporaries fall out of its cache, and the system
# has to give their memory anew each time; smaller ones cost more to start than they save.
NORM_BLOCK_BYTES = 4 * 2**20


def norm(weight: BaseWeight, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out] by the best of three ways, in the accumulation dtype of `weight`; not floored.

    Densely where blocks of W0 lie in memory as they are needed and the processor has a cache to keep W0 + s B A in: as
    fast as the factored sum, and without its cancellation. Factored elsewhere, on a GPU by a kernel of our own.
    """
    if (kernels := norm_kernels(weight.device, weight.dtype)) and (stored := weight.stored()) is not None:
        return kernels.norm(stored, base_squared, lora_A, lora_B, scaling)
    if not weight.has_blocks or weight.device.type != "cpu":
        return norm_squared(weight, base_squared, lora_A, lora_B, scaling).clamp_(min=0).sqrt_()
    step = max(1, min(weight.dense_rows, NORM_BLOCK_BYTES // (weight.in_features * weight.dtype.itemsize)))
    out = torch.empty_like(base_squared)
    buffer = torch.empty(min(step, weight.out_features), weight.in_features, dtype=weight.dtype)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        rows = weight.block(start, stop)
        composed = compose_weight(rows, lora_A, lora_B[start:stop], scaling, out=buffer[: stop - start])
        torch.linalg.vector_norm(composed, dim=1, out=out[start:stop])
    return out


def direction(weight: BaseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """V = W0 + s B A [out, in]."""
    return compose_weight(weight.block(0, weight.out_features), lora_A, lora_B, scaling)


def norm_squared(weight: BaseWeight, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v^2 [out] from the factors, in the accumulation dtype of `weight`:

    v^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

    Args:
        base_squared: ||W0||^2 per row, [out].
        lora_A, lora_B: [r, in] and [out, r], in the accumulation dtype.
    """
    cross = torch.linalg.vecdot(weight.times(lora_A), lora_B)
    change = torch.linalg.vecdot(lora_B @ (lora_A @ lora_A.T), lora_B)
    total = torch.add(base_squared, change, alpha=scaling**2)  # ||W0||^2 + s^2 ||BA||^2
    squared = torch.add(total, cross, alpha=2 * scaling)
    if weight.has_rows:
        cancelling = squared < CANCELLATION * total
        if not cancelling.any():
            return squared
        for rows in cancelling.nonzero()[:, 0].split(weight.dense_rows):
            dense = weight.rows(rows) + scaling * (lora_B[rows] @ lora_A)
            squared[rows] = dense.square_().sum(1)
    return squared


def floor(base_squared: Tensor) -> Tensor:
    """The smallest v that is divided by, [out]: rounding level of ||W0||, for rows whose v vanishes over W0 != 0."""
    return base_squared.sqrt().mul_(torch.finfo(base_squared.dtype).eps).clamp_(min=1e-30)


class _WeightNorm(torch.autograd.Function):
    """v as a differentiable function of A and B, for `detach_norm=False`; W0 is read again, not saved.

    With h = dL/dv / v, P = W0 A^T, G = A A^T:

        dB = s h (P + s B G)            dA = s (hB)^T W0 + s^2 (B^T (hB)) A
    """

    @staticmethod
    def forward(ctx, lora_A, lora_B, weight, norm, scaling):
        ctx.save_for_backward(lora_A, lora_B, norm)
        ctx.weight, ctx.scaling = weight, scaling
        return norm.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        lora_A, lora_B, norm = ctx.saved_tensors
        weight, s = ctx.weight, ctx.scaling
        with torch.autocast(grad.device.type, enabled=False):
            A, B = lora_A.to(norm.dtype), lora_B.to(norm.dtype)
            h = (grad / norm)[:, None]  # [out, 1]
            hB = h * B  # [out, r]
            grad_A = s * weight.vjp(hB) + s**2 * ((B.T @ hB) @ A)  # [r, in]
            grad_B = s * h * (weight.times(A) + s * (B @ (A @ A.T)))  # [out, r]
        return grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), None, None, None


def weight_norm(
    weight: BaseWeight,
    base_squared: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    value: Tensor | None = None,
) -> Tensor:
    """v [out], differentiable with respect to A and B; equals `reference.weight_norm(W0, A, B, s)`.

    `value` is v where it is known already; only its gradient is computed then.
    """
    if value is None:
        with torch.no_grad(), torch.autocast(lora_A.device.type, enabled=False):
            A, B = lora_A.to(base_squared.dtype), lora_B.to(base_squared.dtype)
            value = torch.maximum(norm(weight, base_squared, A, B, scaling), floor(base_squared))
    return _WeightNorm.apply(lora_A, lora_B, weight, value, scaling)


def attach_norm_gradient(norm: Tensor, matrix: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out] unchanged, with its gradient with respect to A and B by plain operations, for torch.compile.

    Args:
        norm: v [out], without gradient.
        matrix: W0 [out, in].
    """
    A, B = lora_A.to(norm.dtype), lora_B.to(norm.dtype)
    cross = (F.linear(matrix.to(norm.dtype), A) * B).sum(1)
    varying = 2 * scaling * cross + scaling * scaling * (F.linear(B, A @ A.T) * B).sum(1)  # v^2 - ||W0||^2
    return norm + (varying - varying.detach()) / (2 * norm)


def scale(magnitude: Tensor, norm: Tensor, tied: Tensor | None) -> Tensor:
    """c [out] = m / v, 1 on tied rows; equals `reference.scale`. `norm` is floored, so nothing divides by zero."""
    if tied is None:
        return magnitude / norm
    # v of a tied row may be 1e-30, and backward divides by its square
    return torch.where(tied, torch.ones_like(norm), magnitude / norm.masked_fill(tied, 1.0))


def compose(z: Tensor, c: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """c * z + b in `dtype`, for z without b. c and b broadcast against z.

    c stays in fp32 over a bf16 z: rounding it would cost more than a whole run changes it.
    """
    y = z * c
    if bias is not None:
        y = y + bias
    return y.to(dtype)


class _Compose(torch.autograd.Function):
    """y = c * z + b, keeping y, which the next operation often keeps anyway, instead of z. With g = dL/dy:

        dz = c * g          db = sum g          dc = sum g (y - b) / c

    If y does not tell z (c = 0, the bias drowns it, somebody wrote over it), z is computed again.
    """

    @staticmethod
    def forward(ctx, z, c, bias, dtype, recompute, outputs, *needed):
        y = compose(z, c, bias, dtype)
        ctx.kept, saved = None, []
        if ctx.needs_input_grad[1]:
            ctx.kept, saved = KeptOutput.of(y, outputs)
        ctx.save_for_backward(c, bias, *saved, *needed)
        ctx.recompute, ctx.dtype, ctx.count = recompute, z.dtype, len(saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        c, bias, *rest = ctx.saved_tensors
        need_z, need_c, need_bias = ctx.needs_input_grad[:3]
        d_z = d_c = d_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_z:
                d_z = (grad * c).to(ctx.dtype)
            if need_c:
                y, _ = ctx.kept.read(rest[: ctx.count], grad)
                if y is None or _has_lost(y, c, bias):
                    z = ctx.recompute(*rest[ctx.count :]).to(c.dtype)
                    d_c = (grad * z).sum_to_size(c.shape)
                else:
                    change = y.to(c.dtype) if bias is None else y.to(c.dtype) - bias
                    d_c = (grad * change).sum_to_size(c.shape) / c
            if need_bias:
                d_bias = grad.sum_to_size(bias.shape).to(bias.dtype)
        return d_z, d_c, d_bias, None, None, None, *(None for _ in ctx.needs_input_grad[6:])


def _has_lost(y: Tensor, c: Tensor, bias: Tensor | None) -> bool:
    """Whether y = c z + b no longer tells some channel of z: c is tiny there, or b drowns c z in rounding.

    The latter is told by a sample of 64 elements a channel, most of which have to be left: the first of a sequence are
    often far larger than all others. See `linear.magnitude_gradient`, which asks the same of a linear layer.
    """
    if not y.numel():
        return False
    if bool((c.abs() < tiny(y.dtype)).any()):
        return True
    if bias is None:
        return False
    channel = y.dim() - max(c.dim(), 1)
    others = [d for d in range(y.dim()) if d != channel]
    each = math.ceil(64 ** (1 / max(len(others), 1)))
    index = [slice(None) if d == channel else slice(None, None, max(1, y.shape[d] // each)) for d in range(y.dim())]
    lost = (y[tuple(index)].to(c.dtype) - bias).abs() < drowned(y.dtype) * bias.abs()
    share = lost.to(c.dtype).mean(others) if others else lost.to(c.dtype)
    return bool((share > 0.5).any())


def compose_keeping_output(
    z: Tensor,
    c: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    recompute: Callable[..., Tensor],
    outputs: Outputs,
    *needed: Tensor,
) -> Tensor:
    """`compose` with less kept for the backward pass.

    Args:
        recompute: Gives z from `needed` again, in the rare cases where y does not tell it; it sets autocast and grad
            mode itself, see `as_now`.
        outputs: What is known about the layer's outputs, kept between calls.
    """
    return _Compose.apply(z, c, bias, dtype, recompute, outputs, *needed)


def as_now(function: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """`function` of tensors, to be called in a backward pass: under the autocast and grad mode of this moment.

    What a base layer computes may depend on both, and on whether its input needs a gradient.
    """
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    grad_mode = torch.is_grad_enabled()

    def again(*tensors: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype, enabled), torch.set_grad_enabled(grad_mode):
            return function(*tensors).detach()

    return again


def compose_paper(
    z: Tensor, dropped_z: Tensor, low_rank: Tensor | None, c: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """z + (c - 1) * dropped_z + c * low_rank + b: dropout mode "paper", with a second base product.

    z = x W0^T and dropped_z = drop(x) W0^T, both without b.
    """
    y = z + (c - 1) * dropped_z
    y = y if low_rank is None else y + c * low_rank
    return (y if bias is None else y + bias).to(dtype)


def linear_branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s x A^T B^T for x [..., in]: [..., out]. The small factors are cast to x's dtype, never x."""
    # s goes into B, [out, r], instead of over [..., out]
    return F.linear(F.linear(x, lora_A.to(x.dtype)), (scaling * lora_B).to(x.dtype))


def conv_branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, base_layer: Any) -> Tensor:
    """s B * (A * x) for a convolution with the geometry of `base_layer`; A [r, in, *kernel] crosses the groups, the
    pointwise B [out, r / groups, 1...] does not. A always pads with zeros, as PEFT's does."""
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[lora_A.dim()]
    after_A = conv(
        x, lora_A.to(x.dtype), None, base_layer.stride, base_layer.padding, base_layer.dilation
    )  # [N, r, *spatial]
    return conv(after_A, (scaling * lora_B).to(x.dtype), groups=base_layer.groups)


def embedding_branch(
    ids: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    embed_scale: Tensor | float | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """s A^T[ids] B^T with A [r, vocab], B [dim, r]: [..., dim]; `embed_scale` comes after the norm."""
    after_A = F.embedding(ids, lora_A.T, padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
    low_rank = F.linear(after_A, (scaling * lora_B).to(after_A.dtype))
    return low_rank if embed_scale is None else low_rank * embed_scale
