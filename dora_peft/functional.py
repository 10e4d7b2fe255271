"""What the layers compute, without any [out, in] temporary: norm, scale and composition.

`weight` is a `base_weight.BaseWeight` here, the seam through which dense, quantised and grouped weights look alike.
The equations and symbols are those of reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .base_weight import BaseWeight

# Where v^2 is below this fraction of ||W0||^2 + s^2 ||BA||^2 the factored sum cancels: in fp32 its error grows to 1e-6
# at 10 % and 1e-5 at 1 %. Such rows are computed densely, a few at a time.
CANCELLATION = 0.25


def norm_squared(weight: BaseWeight, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v^2 [out] from the factors, in the accumulation dtype of `weight`:

    v^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

    Args:
        base_squared: ||W0||^2 per row, [out].
        lora_A, lora_B: [r, in] and [out, r], in the accumulation dtype.
    """
    cross = (weight.times(lora_A) * lora_B).sum(1)
    change = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1).mul_(scaling**2)
    squared = base_squared + change + 2 * scaling * cross
    if weight.has_rows:
        cancelling = squared < CANCELLATION * (base_squared + change)
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
    @torch.autograd.function.once_differentiable
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
            value = norm_squared(weight, base_squared, A, B, scaling).clamp_(min=0).sqrt_()
            value = torch.maximum(value, floor(base_squared))
    return _WeightNorm.apply(lora_A, lora_B, weight, value, scaling)


def scale(magnitude: Tensor, norm: Tensor, tied: Tensor | None) -> Tensor:
    """c [out] = m / v, 1 on tied rows; equals `reference.scale`. `norm` is floored, so nothing divides by zero."""
    c = magnitude / norm
    return c if tied is None else torch.where(tied, torch.ones_like(c), c)


def compose(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """c * (z - b) + b in the dtype of z, where z already contains b. c and b broadcast against z.

    c stays in fp32 over a bf16 z: rounding it would cost more than a whole run changes it.
    """
    y = z * c
    if bias is not None:
        y = y + (1 - c) * bias
    return y.to(z.dtype)


def compose_paper(base_out: Tensor, dropped_base: Tensor, low_rank: Tensor | None, c: Tensor) -> Tensor:
    """base_out + (c - 1) * (drop(x) W0^T) + c * low_rank: dropout mode "paper", with a second base product."""
    y = base_out + (c - 1) * dropped_base
    return (y if low_rank is None else y + c * low_rank).to(base_out.dtype)


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


def embedding(
    ids: Tensor,
    base_out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    c: Tensor,
    *,
    embed_scale: Tensor | float | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """c * (E[ids] + s A^T[ids] B^T) with A [r, vocab], B [dim, r], c [dim]; `embed_scale` comes after the norm."""
    after_A = F.embedding(
        ids, lora_A.T, padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    ).to(base_out.dtype)
    low_rank = F.linear(after_A, (scaling * lora_B).to(base_out.dtype))
    if embed_scale is not None:
        low_rank = low_rank * embed_scale
    return compose(base_out + low_rank.to(base_out.dtype), c, None)


def merged_rows(rows: Tensor, start: int, stop: int, adapters: list[tuple[Tensor, Tensor, float, Tensor]]) -> Tensor:
    """Rows start:stop of W' = c_n (... c_1 (W0 + s_1 B_1 A_1) ... + s_n B_n A_n) for adapters (A, B, s, c)."""
    for lora_A, lora_B, scaling, c in adapters:
        rows = torch.addmm(rows, lora_B[start:stop], lora_A, alpha=scaling) * c[start:stop, None]
    return rows


def combine(
    adapters: list[tuple[Tensor, Tensor, float, Tensor]], weights: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum W0 + sum_i w_i (W'_i - W0) of adapters (A, B, s, c) as one DoRA adapter, without loss.

    With k = 1 + sum_i w_i (c_i - 1) per row the sum is k * (W0 + sum_i (w_i s_i c_i / k) B_i A_i), which is a DoRA
    weight whose scale is k and whose factors are the stacked ones.

    Returns:
        lora_A [sum r_i, in], lora_B [out, sum r_i] (scaling 1) and k [out]; the magnitude is k * ||W0 + B A||.
    """
    k = torch.ones_like(adapters[0][3])
    for (_, _, _, c), w in zip(adapters, weights, strict=True):
        k = k + w * (c - 1)
    # a row whose scale is exactly 0 has no direction; any tiny k gives the same weight up to rounding
    k = torch.where(k.abs() < torch.finfo(k.dtype).eps, torch.finfo(k.dtype).eps, k)
    lora_A = torch.cat([A.to(k.dtype) for A, _, _, _ in adapters])
    lora_B = torch.cat([(w * s * c / k)[:, None] * B for (_, B, s, c), w in zip(adapters, weights, strict=True)], 1)
    return lora_A, lora_B, k


def truncate(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation of B A (truncated SVD through two thin QR decompositions, no [out, in])."""
    q_B, r_B = torch.linalg.qr(lora_B)  # [out, k], [k, r]
    q_A, r_A = torch.linalg.qr(lora_A.T)  # [in, k], [k, r]
    u, sigma, vh = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    return (root[:, None] * vh[:rank]) @ q_A.T, q_B @ (u[:, :rank] * root)
