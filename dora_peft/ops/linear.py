"""DoRA's linear layer as one autograd function: forward, backward, and what is kept between them.

    u = drop(x) A^T                      [N, r]
    y = c * (x W0^T + s u B^T) + b       [N, out]

LoRA's eager layer makes a product, a scaled copy and a sum of it, each [N, out]; here the base product is scaled and
the low-rank product accumulated into it, in place. For many tokens and without dropout even that is more than composing
the weight: y = x (c (W0 + s B A))^T + b, and dx from the same matrix, which is made twice and never kept. Kept for the
backward pass are

    x    shared with every other layer that reads it, in its own dtype
    y    the layer's *output*, which the next operation often keeps anyway, instead of an intermediate
    u    [N, r], and where there is dropout one byte an element of x, on a GPU its seed alone

The price of keeping y: if it no longer determines what the magnitude's gradient needs, that is computed again from x.
This happens for rows with c = 0, for rows whose bias drowns the rest in rounding, and if somebody wrote over y, which
ops/kept_output.py tells by its content.

Everything runs in the base's compute dtype: the small A and B are cast, x and W0 never are (but by autocast). c, b and
all sums over tokens are fp32 (fp64 for an fp64 base).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bases import BLOCK_BYTES
from . import choice
from .constants import LOW_PRECISION, drowned, tiny
from .kept_output import KeptOutput, Outputs, version

# Tokens that the element-wise passes take at once on a CPU: their temporaries stay in the cache, and a fresh
# [N, out] allocation, whose page faults cost more than its arithmetic, is not made for every layer. With fewer the
# products suffer: by 2 % at 512, 10 % at 256.
CHUNK = 1024
LANES = 2**18  # elements that a sum over tokens runs in side by side: half of a core's cache
COMPOSED_BYTES = BLOCK_BYTES  # the most that c (W0 + s B A) may take
_NO_GRADIENTS = (None,) * 8  # of _Linear's arguments after c


def linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    scaling: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    base_product: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    dropout_p: float = 0.0,
    direction: Tensor | None = None,
    outputs: Outputs | None = None,
) -> Tensor:
    """y = c * (x W0^T + s drop(x) A^T B^T) + b; in one line `c * (x @ W0.T + s * drop(x) @ A.T @ B.T) + b`.

    Give either `weight`, or `base_out` and `base_product` where W0 is at hand as a product only.

    Args:
        x: [..., in].
        lora_A, lora_B: [r, in] and [out, r], of any floating dtype.
        c: [out] = m / v, fp32 or fp64; carries the gradient of m (and of v, where that is not detached).
        scaling: s.
        weight: W0 [out, in], frozen; may be a transposed view.
        bias: b [out].
        base_out: x W0^T + b [..., out] from the base layer, whose own backward gives its part of dx.
        base_product: Gives x W0^T without b for rows `index` of W0 (all where None), in the rare cases above. May have
            a method `stored` that gives W0 to kernels, see `base_weight.BaseWeight.stored`.
        dropout_p: Probability to drop an element of x before A.
        direction: W0 + s B A [out, in] in x's dtype, where the caller has just computed it and needs it no more: it is
            overwritten.
        outputs: What is known about the layer's outputs, kept between calls.

    Returns:
        [..., out] in x's dtype, under autocast in autocast's. Differentiable once, with respect to x, base_out, bias,
        lora_A, lora_B and c.
    """
    dtype = x.dtype if base_out is None else base_out.dtype
    outputs = Outputs() if outputs is None else outputs
    base = (x, base_out, bias, lora_A, lora_B, c, weight, base_product, scaling, dropout_p)
    if not torch.is_autocast_enabled(x.device.type):
        return _Linear.apply(*base, dtype, None, direction, outputs)
    lowered = torch.get_autocast_dtype(x.device.type)
    if base_out is None and dtype is not torch.float64:
        dtype = lowered
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(*base, dtype, lowered, None, outputs)


def linear_eval(
    x: Tensor,
    lora_A: Tensor,
    folded_B: Tensor,
    c: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
) -> Tensor:
    """`linear` without dropout and gradients, from `folded_B` = s c * B [out, r], which is computed once."""
    autocast = torch.is_autocast_enabled(x.device.type)
    same = x.dtype is c.dtype is lora_A.dtype is folded_B.dtype
    if weight is not None and not autocast and same and not choice.uses_kernels(x.device, x.dtype):
        rows = _rows(x)
        z = multiply(rows, weight, bias)
        z = compose(z, multiply(rows, lora_A), folded_B, c, bias, out=z)
        return z.view(*x.shape[:-1], -1 if len(rows) else len(c))
    dtype = x.dtype if base_out is None else base_out.dtype
    if base_out is None and autocast and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        rows = _rows(x).to(dtype)
        u = multiply(rows, lora_A.to(dtype))
        if base_out is not None:
            z = _rows(base_out)
        else:
            assert weight is not None
            z = multiply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        if fused := choice.fused(z, c):
            y = fused.compose_folded(z, u, folded_B, c, bias, in_place=base_out is None)
        else:
            y = compose(z, u, folded_B, c, bias, out=z if base_out is None else torch.empty_like(z))
    return _shaped_like(x, y)


def linear_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    scaling: float,
    p: float,
    places: int,
) -> Tensor:
    """`linear` for a dense weight, by the operator on Triton kernels that torch.compile takes as it is.

    Args:
        places: Draws the places of y that tell whether it was overwritten.
    """
    choice.load_operators()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if p > 0 else None
    return torch.ops.dora_peft.linear(x, weight, bias, lora_A, lora_B, c, seed, scaling, p, places)[0]


class _Linear(torch.autograd.Function):
    """With g = dL/dy, u = drop(x) A^T, k = s / (1 - p):

    g' = c * g          du = g (k c * B)          dx = g' W0 + mask * (du A)
    dA = du^T (mask * x)          dB = k c * (g^T u)          dc_j = sum_n g_nj (y_nj - b_j) / c_j
    """

    @staticmethod
    def forward(
        ctx,
        x,
        base_out,
        bias,
        lora_A,
        lora_B,
        c,
        weight,
        base_product,
        scaling,
        dropout_p,
        dtype,
        autocast_dtype,
        direction,
        outputs,
    ):
        rows = _rows(x).to(dtype)  # [N, in]
        mask, k = None, scaling
        ctx.fused = choice.fused(rows, c)
        if ctx.fused is not None:
            # the mask is drawn from it
            seed = ctx.fused.draw_seed(rows.device) if dropout_p > 0 else None
            ctx.options = ctx.fused.KernelOptions.of(scaling, dropout_p, seed, ctx.needs_input_grad[:6])
            k, base_rows = ctx.options.k, None if weight is not None else _rows(base_out)
            y, u = ctx.fused.forward(rows, base_rows, weight, bias, lora_A, lora_B, c, ctx.options)
            return _Linear.keep(
                ctx, _shaped_like(x, y), x, u, None, bias, lora_A, lora_B, c,
                weight, base_product, k, autocast_dtype, outputs,
            )  # fmt: skip
        if dropout_p > 0:
            mask, kept = dropout_mask(rows.shape, dropout_p, rows.device)
            k = scaling / kept if kept else 0.0
        u = multiply(rows if mask is None else rows * mask, lora_A.to(dtype))  # [N, r]
        if weight is None:
            z = _rows(base_out)
            y = compose(z, u, fold(lora_B, c, k), c, bias, out=torch.empty_like(z))
        elif mask is None and composes(rows, weight):
            if direction is None:
                direction = compose_weight(weight, lora_A, lora_B, k)
            y = multiply(rows, direction.mul_(c[:, None]), bias)
        else:
            z = multiply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
            y = compose(z, u, fold(lora_B, c, k), c, bias, out=z)
        return _Linear.keep(
            ctx, _shaped_like(x, y), x, u, mask, bias, lora_A, lora_B, c,
            weight, base_product, k, autocast_dtype, outputs,
        )  # fmt: skip

    @staticmethod
    def keep(ctx, y, x, u, mask, bias, lora_A, lora_B, c, weight, base_product, k, autocast_dtype, outputs):
        """Keep what the backward pass needs, and return y."""
        ctx.kept, saved = None, []
        if ctx.needs_input_grad[5]:
            ctx.kept, saved = KeptOutput.of(y, outputs, on_device=ctx.fused is not None)
        ctx.save_for_backward(x, u, mask, bias, lora_A, lora_B, c, *saved)
        # not among the saved tensors: offloading would move W0 with them
        ctx.weight, ctx.weight_version = weight, version(weight)
        ctx.base_product, ctx.k, ctx.dtype, ctx.autocast_dtype = base_product, k, y.dtype, autocast_dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if version(ctx.weight) != ctx.weight_version:
            raise RuntimeError(
                "A base weight was changed in place between the forward and the backward pass that needs it "
                f"(shape {list(ctx.weight.shape)}). Change base weights before the forward pass, or after backward."
            )
        if torch.is_autocast_enabled(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _Linear.gradients(ctx, grad)
        return _Linear.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        x, u, mask, bias, lora_A, lora_B, c, *kept = ctx.saved_tensors
        need_x, need_base, need_bias, need_A, need_B, need_c = ctx.needs_input_grad[:6]
        k, dtype = ctx.k, ctx.dtype
        y, gone = (None, None) if ctx.kept is None else ctx.kept.read(kept, grad)
        y = None if y is None else _rows(y)
        g = _rows(grad)  # [N, out]
        rows = _rows(x).to(dtype)  # [N, in]
        weight = None if ctx.weight is None else ctx.weight.to(dtype)  # [out, in]
        d_bias = d_A = d_B = d_c = None

        def z_at(index: Tensor | None) -> Tensor:
            """x W0^T + s u B^T at columns `index`, at all where None."""
            if weight is not None:
                z = F.linear(rows, weight if index is None else weight[index])
            else:
                with torch.autocast(x.device.type, ctx.autocast_dtype, enabled=ctx.autocast_dtype is not None):
                    z = _rows(ctx.base_product(x, index))
            B = lora_B if index is None else lora_B[index]
            return torch.addmm(z.to(c.dtype), u.to(c.dtype), B.to(c.dtype).T, alpha=k)

        if ctx.fused is not None:

            def d_magnitude(sums: Tensor | None) -> Tensor:
                return magnitude_gradient(sums, g, y, c, bias, z_at)

            stored = ctx.weight
            if stored is None and need_c and hasattr(ctx.base_product, "stored"):
                stored = ctx.base_product.stored()
            dx, d_base, *others = ctx.fused.gradients(
                g, rows, u, y, weight, bias, lora_A, lora_B, c, ctx.options,
                stored=stored, d_magnitude=d_magnitude, gone=gone,
            )  # fmt: skip
            dx = None if dx is None else dx.view(x.shape)
            d_base = None if d_base is None else d_base.view(grad.shape)
            return dx, d_base, *others, *_NO_GRADIENTS
        in_weight = need_x and weight is not None and composes(g, weight)
        dx, d_base, sums = scale_and_sum(
            g, c, y if need_c else None, bias, weight if need_x and not in_weight else None, keep_scaled=need_base
        )
        if need_c:
            d_c = magnitude_gradient(sums, g, y, c, bias, z_at)  # [out]
        kc = (k * c)[:, None]
        # g^T u is faster than u^T g on CPUs, whose libraries split the long side of a result
        if need_B:
            d_B = (g.T @ u) * kc  # [out, r]
        if need_A or need_x:
            folded = (lora_B * kc).to(dtype)  # [out, r]
            du = multiply(g, folded.T)  # [N, r]
        if need_A:
            d_A = ((rows if mask is None else rows * mask).T @ du).T  # [r, in]
        if need_x and in_weight:
            if mask is None:
                dx = multiply(g, compose_weight(weight, lora_A, lora_B, k).mul_(c[:, None]).T)
            else:
                dx = multiply(g, (weight * c[:, None]).T).add_((du @ lora_A.to(dtype)).mul_(mask))
            dx = dx.view(x.shape)
        elif need_x:
            A = lora_A.to(dtype)
            if mask is not None:
                low_rank = (du @ A).mul_(mask)  # [N, in]
                dx = low_rank if dx is None else dx.add_(low_rank)
            else:
                dx = du @ A if dx is None else dx.addmm_(du, A)
            dx = dx.view(x.shape)
        if need_bias:
            d_bias = g.sum(0, dtype=c.dtype)
            if weight is None:  # the rest comes through base_out
                d_bias = (1 - c) * d_bias
        d_base = None if d_base is None else d_base.view(grad.shape)
        return dx, d_base, d_bias, d_A, d_B, d_c, *_NO_GRADIENTS


def composes(rows: Tensor, weight: Tensor) -> bool:
    """Whether products of `rows` [N, in] or [N, out] with W0 [out, in] are made from c (W0 + s B A) instead.

    That scales out x in numbers instead of N x out, and does without the product and the sum of the low-rank branch. It
    would round B A away in low precision. On a GPU, kernels fuse these passes. It pays from about as many tokens as
    there are features; from half as many it still does where every forward pass needs a new norm, but costs with
    gradient accumulation or checkpointing.
    """
    length, (out_features, in_features) = rows.shape[:-1].numel(), weight.shape
    return (
        weight.device.type == "cpu"
        and not choice.uses_kernels(weight.device, weight.dtype)
        and not torch.is_autocast_enabled("cpu")
        and rows.dtype is weight.dtype
        and weight.dtype not in LOW_PRECISION
        and weight.nbytes <= COMPOSED_BYTES
        and 2 * length * (out_features + in_features) >= 3 * out_features * in_features
    )


def compose_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """V = W0 + s B A [out, in] in W0's dtype and layout; into `out`, where given, for a contiguous W0."""
    lora_A, scaled_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype) * scaling
    if weight.is_contiguous():
        return torch.addmm(weight, scaled_B, lora_A, out=out)
    return torch.addmm(weight.T, lora_A.T, scaled_B.T).T


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W0^T + b [N, out] for x [N, in], by the faster library where there are two."""
    if (
        _ONEDNN is not None
        and rows.dtype is torch.float32
        and rows.device.type == "cpu"
        and len(rows) >= _ONEDNN_LEAST_ROWS
        and len(rows) * weight.numel() >= _ONEDNN_LEAST
        and torch.backends.mkldnn.enabled
    ):
        return _ONEDNN(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def _find_onednn() -> Any:
    """oneDNN's fp32 product on AMD processors, where it takes 8 to 10 % less time than MKL, torch's own choice.

    torch has no public name for it; without this one everything goes through `F.linear`.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if "AMD" not in capabilities.get("cpu_name", ""):
        return None
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if operation is None else operation.default


_ONEDNN = _find_onednn()
_ONEDNN_LEAST = 2**21  # multiplications; it takes 12 us to start
# With few rows an adapter that changes nothing yet gives the base model's output bit for bit.
_ONEDNN_LEAST_ROWS = 64


def _rows(x: Tensor) -> Tensor:
    """[..., features] as [N, features]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [N, out] as [..., out]. Not a view: the output of an autograd function could not be changed in place then."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def fold(lora_B: Tensor, c: Tensor, scaling: float) -> Tensor:
    """s c * B [out, r], in c's dtype or wider."""
    return lora_B * (scaling * c)[:, None]


def compose(z: Tensor, u: Tensor, folded_B: Tensor, c: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """out = c * (z - b) + u folded_B^T + b for z = x W0^T + b [N, out] and u [N, r]; `out` may be z.

    Where z is narrower than c, the sum is made in c's dtype and rounded once. Where c = 1 and B = 0, `out` equals z bit
    for bit: an adapter that changes nothing yet gives the base layer's output.
    """
    offset = None if bias is None else (1 - c) * bias
    if z.dtype is c.dtype or z.device.type != "cpu":
        # a GPU's element-wise kernels convert in registers, and its products accumulate in fp32
        if offset is None:
            torch.mul(z, c, out=out)
        else:
            torch.addcmul(offset, z, c, out=out)
        return out.addmm_(u, folded_B.T.to(out.dtype))
    step = _step(len(z), z.device) if len(z) else 1
    for start in range(0, len(z), step):
        part = slice(start, start + step)
        wide = z[part].to(c.dtype)
        if offset is None:
            wide.mul_(c)
        else:
            torch.addcmul(offset, wide, c, out=wide)
        out[part] = wide.addmm_(u[part].to(c.dtype), folded_B.T.to(c.dtype))
    return out


def scale_and_sum(
    g: Tensor, c: Tensor, y: Tensor | None, bias: Tensor | None, weight: Tensor | None, *, keep_scaled: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over g [N, out], a few tokens at a time: g' = c * g, its product with W0, and sum_n g (y - b).

    Returns:
        g' W0 [N, in] where `weight` is given, g' [N, out] where `keep_scaled`, the sums [out] where y is given.
    """
    length, width = g.shape
    step = _step(length, g.device) if length else 1
    inner = min(step, max(1, LANES // width)) if g.device.type == "cpu" else step
    product = scaled = buffer = lanes = None
    if weight is not None and length != step:
        product = g.new_empty(length, weight.shape[1])
    if keep_scaled:
        scaled = torch.empty_like(g, memory_format=torch.contiguous_format)
    elif weight is not None:
        buffer = g.new_empty(min(step, length), width)
    for start in range(0, length, step):
        stop = min(start + step, length)
        target = scaled[start:stop] if scaled is not None else buffer
        for low in range(start, stop, inner):
            high = min(low + inner, stop)
            part = g[low:high]
            if y is not None:
                lanes = _add_product(lanes, part, y[low:high], bias, c.dtype)
            if target is not None:
                torch.mul(part, c, out=target[low - start : high - start])
        if weight is not None:
            assert target is not None
            rows = multiply(target[: stop - start], weight.T)
            if product is None:
                product = rows
            else:
                product[start:stop] = rows
    if y is None:
        return product, scaled, None
    return product, scaled, c.new_zeros(width) if lanes is None else lanes.sum(0)


def _add_product(sums: Tensor | None, g: Tensor, y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums + g (y - b) [N, out] in `dtype`, in place where there are sums, of at least as many tokens."""
    if bias is not None:
        y = y.to(dtype) - bias
    if sums is None:
        return torch.mul(g.to(dtype), y)
    part = sums[: len(g)]
    if g.dtype is y.dtype is dtype:
        part.addcmul_(g, y)
    else:
        part.add_(g.to(dtype, copy=True).mul_(y))
    return sums


def magnitude_gradient(
    sums: Tensor | None,
    g: Tensor,
    y: Tensor | None,
    c: Tensor,
    bias: Tensor | None,
    z_at: Callable[[Tensor | None], Tensor],
) -> Tensor:
    """dc_j = sum_n g_nj z_nj [out], with z = (y - b) / c where y still tells z and from `z_at(columns)` elsewhere.

    Args:
        sums: sum_n g (y - b), None where y is.
        y: The layer's output [N, out], None where it was changed since.
        z_at: Computes z [N, len(index)] at columns `index`, [N, out] where that is None.
    """
    if y is None or sums is None:
        return (g * z_at(None)).sum(0)
    least = tiny(y.dtype)
    if bias is None:
        if not len(y) or torch.linalg.vector_norm(c, -torch.inf) >= least:  # the smallest |c|
            return sums / c
        lost = c.abs() < least
    else:
        # the rounding of y = c z + b against the size of c z, on a sample of the tokens; its median, since the first
        # token is often far larger than all others
        sample = y[:: max(1, len(y) // 64)].to(c.dtype) - bias
        lost = c.abs() < least
        if len(y):
            lost |= sample.abs_().median(0).values < drowned(y.dtype) * bias.abs()
    index = lost.nonzero()[:, 0]
    if not len(index):
        return sums / c
    exact = (g[:, index] * z_at(index)).sum(0)
    return (sums / c.masked_fill(lost, 1)).index_copy_(0, index, exact)


def _step(length: int, device: torch.device) -> int:
    """How many of `length` tokens to take at once: equal parts of at most CHUNK on a CPU, all elsewhere."""
    return -(-length // -(-length // CHUNK)) if device.type == "cpu" else length


def dropout_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """A boolean mask that is False with probability p, and the exact probability of True.

    On a CPU torch draws one number an element, which takes longer than the product that follows. Here each 64-bit
    number serves four elements, so p is rounded to a multiple of 2^-16; dividing by the exact probability keeps the
    expectation.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p), 1 - p
    count, dropped = shape.numel(), round(p * 2**16)
    if dropped == 2**16:
        return torch.zeros(shape, dtype=torch.bool), 0.0
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return (numbers >= dropped - 2**15).view(shape), 1 - dropped / 2**16
