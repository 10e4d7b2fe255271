"""y = c * z + b for every kind of layer but the linear one, and the low-rank branch of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.input_gradient import differentiated_twice
from .constants import DROWNED, TINY
from .kept_output import KeptOutput
from .overwritten import Outputs


def compose(z: Tensor, c: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """c * z + b in `dtype`, for z without b. c and b broadcast against z.

    c stays in fp32 over a bf16 z: rounding it would cost more than a whole run changes it.
    """
    y = z * c
    if bias is not None:
        y = y + bias
    return y.to(dtype)


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Recipe(NamedTuple):
    """What `_Compose` is given besides tensors.

    Attributes:
        dtype: The output's.
        recompute: Gives z from the tensors that were saved for it, see `compose_keeping_output`.
        outputs: What is known about the layer's outputs, kept between calls.
    """

    dtype: torch.dtype
    recompute: Callable[..., Tensor]
    outputs: Outputs


class _Compose(torch.autograd.Function):
    """y = c * z + b, keeping y, which the next operation often keeps anyway, instead of z. With g = dL/dy:

        dz = c * g          db = sum g          dc = sum g (y - b) / c

    If y does not determine z (c = 0, the bias drowns it, somebody wrote over it), z is computed again.
    """

    @staticmethod
    def forward(ctx, z, c, bias, recipe, *needed):
        y = compose(z, c, bias, recipe.dtype)
        ctx.kept, saved = None, []
        if ctx.needs_input_grad[1]:
            ctx.kept = KeptOutput(y, recipe.outputs)
            saved, ctx.kept.saved = ctx.kept.saved, []
        ctx.save_for_backward(c, bias, *saved, *needed)
        ctx.recipe, ctx.z_dtype, ctx.count = recipe, z.dtype, len(saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise differentiated_twice()
        c, bias, *rest = ctx.saved_tensors
        need_z, need_c, need_bias = ctx.needs_input_grad[:3]
        d_z = d_c = d_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_z:
                d_z = (grad * c).to(ctx.z_dtype)
            if need_c:
                y, _ = ctx.kept.read(rest[: ctx.count], grad)
                if y is None or _has_lost(y, c, bias):
                    z = ctx.recipe.recompute(*rest[ctx.count :]).to(c.dtype)
                    d_c = (grad * z).sum_to_size(c.shape)
                else:
                    change = y.to(c.dtype) if bias is None else y.to(c.dtype) - bias
                    d_c = (grad * change).sum_to_size(c.shape) / c
            if need_bias:
                d_bias = grad.sum_to_size(bias.shape).to(bias.dtype)
        return d_z, d_c, d_bias, None, *(None for _ in ctx.needs_input_grad[4:])


def _has_lost(y: Tensor, c: Tensor, bias: Tensor | None) -> bool:
    """Whether y = c z + b no longer determines some channel of z: c is tiny there, or b drowns c z in rounding.

    The latter is judged by a sample of 64 elements a channel, most of which have to be left: the first of a sequence
    are often far larger than all others. `linear_autograd.magnitude_gradient` asks the same of a linear layer.
    """
    if not y.numel():
        return False
    if bool((c.abs() < TINY[y.dtype]).any()):
        return True
    if bias is None:
        return False
    channel = y.dim() - max(c.dim(), 1)
    others = [d for d in range(y.dim()) if d != channel]
    each = math.ceil(64 ** (1 / max(len(others), 1)))
    index = [slice(None) if d == channel else slice(None, None, max(1, y.shape[d] // each)) for d in range(y.dim())]
    lost = (y[tuple(index)].to(c.dtype) - bias).abs() < DROWNED[y.dtype] * bias.abs()
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
        recompute: Gives z from `needed` again, in the rare cases in which y does not determine it; it sets autocast
            and grad mode itself, see `as_now`.
        outputs: What is known about the layer's outputs, kept between calls.
    """
    return _Compose.apply(z, c, bias, Recipe(dtype, recompute, outputs), *needed)


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


def conv_branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, base_layer: Convolution) -> Tensor:
    """s B * (A * x) for a convolution with the geometry of `base_layer`; A [r, in, *kernel] crosses the groups, the
    pointwise B [out, r / groups, 1...] does not. A always pads with zeros, as PEFT's does."""
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[lora_A.dim()]
    # [N, r, *spatial]
    after_A = conv(x, lora_A.to(x.dtype), None, base_layer.stride, base_layer.padding, base_layer.dilation)
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
