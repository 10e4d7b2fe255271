"""DoRA's linear layer as one autograd function: forward, backward, and what is kept between them.

    u = drop(x) A^T                      [N, r]
    y = c * (x W0^T + s u B^T) + b       [N, out]

LoRA's eager layer makes a product, a scaled copy and a sum of it, each [N, out]; here the base product is scaled and
the low-rank product accumulated into it, in place. Kept for the backward pass are

    x    shared with every other layer that reads it, in its own dtype
    y    the layer's *output*, which the next operation often keeps anyway, instead of an intermediate
    u    [N, r], and one byte an element of x where there is dropout

The price of keeping y: where it no longer determines what the magnitude's gradient needs, that is computed again from
x. This happens for rows with c = 0, for rows whose bias drowns the rest in rounding, and where the next operation
changed y in place (`relu_`), which a version counter tells.

Everything runs in the base's compute dtype: the small A and B are cast, x and W0 never are (but by autocast). c, b and
all sums over tokens are fp32 (fp64 for an fp64 base).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens that the element-wise passes take at once on a CPU: their temporaries stay in the cache, and a fresh
# [N, out] allocation, whose page faults cost more than its arithmetic, is not made for every layer. With fewer the
# products suffer: by 2 % at 512, 10 % at 256.
CHUNK = 1024
_LOW_PRECISION = (torch.float16, torch.bfloat16)


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
        base_product: Gives x W0^T without b for rows `index` of W0 (all where None), in the rare cases above.
        dropout_p: Probability to drop an element of x before A.

    Returns:
        [..., out] in x's dtype, under autocast in autocast's. Differentiable once, with respect to x, base_out, bias,
        lora_A, lora_B and c.
    """
    dtype = x.dtype if base_out is None else base_out.dtype
    if not torch.is_autocast_enabled(x.device.type):
        return _Linear.apply(
            x, base_out, bias, lora_A, lora_B, c, weight, base_product, scaling, dropout_p, dtype, None
        )
    lowered = torch.get_autocast_dtype(x.device.type)
    if base_out is None and dtype is not torch.float64:
        dtype = lowered
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(
            x, base_out, bias, lora_A, lora_B, c, weight, base_product, scaling, dropout_p, dtype, lowered
        )


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
    if weight is not None and not autocast and x.dtype is c.dtype is lora_A.dtype is folded_B.dtype:
        rows = _rows(x)
        z = F.linear(rows, weight)
        z = z.mul_(c) if bias is None else torch.addcmul(bias, z, c, out=z)
        return z.addmm_(F.linear(rows, lora_A), folded_B.T).view(*x.shape[:-1], -1 if len(rows) else len(c))
    dtype = x.dtype if base_out is None else base_out.dtype
    if base_out is None and autocast and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        rows = _rows(x).to(dtype)
        u = F.linear(rows, lora_A.to(dtype))
        if base_out is not None:
            z = _rows(base_out)
            y = compose(z, u, folded_B, c, None if bias is None else (1 - c) * bias, out=torch.empty_like(z))
        else:
            assert weight is not None
            z = F.linear(rows, weight.to(dtype))
            y = compose(z, u, folded_B, c, bias, out=z)
    return _shaped_like(x, y)


class _Linear(torch.autograd.Function):
    """With g = dL/dy, u = drop(x) A^T, k = s / (1 - p):

    g' = c * g          du = g (k c * B)          dx = g' W0 + mask * (du A)
    dA = du^T (mask * x)          dB = k c * (g^T u)          dc_j = sum_n g_nj (y_nj - b_j) / c_j
    """

    @staticmethod
    def forward(
        ctx, x, base_out, bias, lora_A, lora_B, c, weight, base_product, scaling, dropout_p, dtype, autocast_dtype
    ):
        rows = _rows(x).to(dtype)  # [N, in]
        mask, k = None, scaling
        if dropout_p > 0:
            mask, kept = dropout_mask(rows.shape, dropout_p, rows.device)
            k = scaling / kept if kept else 0.0
        u = F.linear(rows if mask is None else rows * mask, lora_A.to(dtype))  # [N, r]
        if weight is None:
            z = _rows(base_out)
            offset = None if bias is None else (1 - c) * bias  # base_out contains b
            y = compose(z, u, fold(lora_B, c, k), c, offset, out=torch.empty_like(z))
        else:
            z = F.linear(rows, weight.to(dtype))
            y = compose(z, u, fold(lora_B, c, k), c, bias, out=z)
        y = _shaped_like(x, y)
        # An alias, since y on its own graph node would be a reference cycle. Under checkpointing and offloading y has
        # to go through their hooks, which switch off torch's own check for changes in place; there the alias keeps
        # y's version counter and lets go of its storage.
        ctx.alias, ctx.version, ctx.through_hooks = y.detach(), _version(y), saved_tensor_hooks_active()
        if ctx.through_hooks:
            ctx.alias.data = y.new_empty(0)
            ctx.save_for_backward(x, u, mask, bias, lora_A, lora_B, c, y)
        else:
            ctx.save_for_backward(x, u, mask, bias, lora_A, lora_B, c)
        # not among the saved tensors: offloading would move W0 with them
        ctx.weight, ctx.weight_version = weight, _version(weight)
        ctx.base_product, ctx.k, ctx.dtype, ctx.autocast_dtype = base_product, k, dtype, autocast_dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if _version(ctx.weight) != ctx.weight_version:
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
        x, u, mask, bias, lora_A, lora_B, c, *saved_y = ctx.saved_tensors
        need_x, need_base, need_bias, need_A, need_B, need_c = ctx.needs_input_grad[:6]
        k, dtype, alias = ctx.k, ctx.dtype, ctx.alias
        y = None if alias is None or _version(alias) != ctx.version else _rows(saved_y[0] if saved_y else alias)
        if not ctx.through_hooks:
            ctx.alias = None  # lets go of y as the saved tensors are; a second pass over the graph computes it again
        g = _rows(grad)  # [N, out]
        rows = _rows(x).to(dtype)  # [N, in]
        weight = None if ctx.weight is None else ctx.weight.to(dtype)  # [out, in]
        d_bias = d_A = d_B = d_c = None

        def z_at(index: Tensor | None) -> Tensor:
            """x W0^T + s u B^T at columns `index`, at all where None."""
            if weight is not None:
                z = F.linear(rows, weight if index is None else weight[index])
            elif ctx.autocast_dtype is None:
                z = _rows(ctx.base_product(x, index))
            else:
                with torch.autocast(x.device.type, ctx.autocast_dtype):
                    z = _rows(ctx.base_product(x, index))
            B = lora_B if index is None else lora_B[index]
            return torch.addmm(z.to(c.dtype), u.to(c.dtype), B.to(c.dtype).T, alpha=k)

        dx, d_base, sums = scale_and_sum(
            g, c, y if need_c else None, bias, weight if need_x else None, keep_scaled=need_base
        )
        if need_c:
            d_c = magnitude_gradient(sums, g, y, c, bias, z_at)  # [out]
        kc = k * c
        if need_B:
            d_B = ((u.T @ g) * kc).T  # [out, r]
        if need_A or need_x:
            du = g @ (lora_B * kc[:, None]).to(dtype)  # [N, r]
        if need_A:
            d_A = du.T @ (rows if mask is None else rows * mask)  # [r, in]
        if need_x:
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
        return dx, d_base, d_bias, d_A, d_B, d_c, None, None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """[..., features] as [N, features]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [N, out] as [..., out]. Not a view: the output of an autograd function could not be changed in place then."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def fold(lora_B: Tensor, c: Tensor, scaling: float) -> Tensor:
    """s c * B [out, r], in c's dtype or wider."""
    return lora_B * (scaling * c)[:, None]


def compose(z: Tensor, u: Tensor, folded_B: Tensor, c: Tensor, offset: Tensor | None, *, out: Tensor) -> Tensor:
    """out = c * z + u folded_B^T + offset for z [N, out] and u [N, r]; `out` may be z.

    Where z is narrower than c, the sum is made in c's dtype and rounded once.
    """
    if z.dtype is c.dtype:
        if offset is None:
            torch.mul(z, c, out=out)
        else:
            torch.addcmul(offset, z, c, out=out)
        return out.addmm_(u, folded_B.T.to(out.dtype))
    if z.device.type != "cpu":
        # element-wise kernels convert in registers, and the product accumulates in fp32
        if offset is None:
            torch.mul(z, c, out=out)
        else:
            torch.addcmul(offset.to(c.dtype), z, c, out=out)
        return out.addmm_(u, folded_B.T.to(out.dtype))
    step = _step(len(z), z.device) if len(z) else 1
    for start in range(0, len(z), step):
        part = slice(start, start + step)
        wide = z[part].to(c.dtype)
        if offset is None:
            wide.mul_(c)
        else:
            torch.addcmul(offset.to(c.dtype), wide, c, out=wide)
        out[part] = wide.addmm_(u[part].to(c.dtype), folded_B.T.to(c.dtype))
    return out


def scale_and_sum(
    g: Tensor, c: Tensor, y: Tensor | None, bias: Tensor | None, weight: Tensor | None, *, keep_scaled: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over g [N, out], some tokens at a time: g' = c * g, its product with W0, and sum_n g (y - b).

    Returns:
        g' W0 [N, in] where `weight` is given, g' [N, out] where `keep_scaled`, the sums [out] where y is given.
    """
    length, width = g.shape
    product = None if weight is None else g.new_empty(length, weight.shape[1])
    scaled = torch.empty_like(g, memory_format=torch.contiguous_format) if keep_scaled else None
    if not length:
        return product, scaled, None if y is None else c.new_zeros(width)
    step = _step(length, g.device)
    buffer = g.new_empty(step, width, dtype=c.dtype)
    narrow = buffer if g.dtype is c.dtype else g.new_empty(step, width)
    sums = None
    for start in range(0, length, step):
        part = slice(start, start + step)
        g_part = g if step == length else g[part]
        height = len(g_part)
        if y is not None:
            products = buffer if height == step else buffer[:height]
            if bias is not None:
                torch.sub(y[part].to(c.dtype), bias, out=products).mul_(g_part)
            elif g.dtype is c.dtype:
                torch.mul(g_part, y[part], out=products)
            else:
                products.copy_(g_part).mul_(y[part])
            sums = products.sum(0) if sums is None else sums.add_(products.sum(0))
        if weight is not None or scaled is not None:
            target = scaled[part] if scaled is not None else narrow if height == step else narrow[:height]
            torch.mul(g_part, c, out=target)
            if product is not None:
                torch.mm(target, weight, out=product[part])  # type: ignore[arg-type]
    return product, scaled, sums


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
    size, tiny = c.abs(), _TINY.get(y.dtype, 1e-30)
    if bias is None:
        if not len(y) or size.min() >= tiny:
            return sums / c
        lost = size < tiny
    else:
        # the rounding of y = c z + b against the size of c z, on a sample of the tokens; its median, since the first
        # token is often far larger than all others
        sample = y[:: max(1, len(y) // 64)].to(c.dtype) - bias
        lost = size < tiny
        if len(y):
            lost |= sample.abs_().median(0).values < _DROWNED.get(y.dtype, 1e-3) * bias.abs()
    index = lost.nonzero()[:, 0]
    if not len(index):
        return sums / c
    exact = (g[:, index] * z_at(index)).sum(0)
    return (sums / c.masked_fill(lost, 1)).index_copy_(0, index, exact)


# Below this c, y = c z is subnormal or close to it; fp16's smallest normal number is 6e-5.
_TINY = {torch.float16: 2.0**-8}
# |c z| / |b| below which too few digits of z are left in y; 2 bits of the 8 or 11 may go, in fp32 10 of 24.
_DROWNED = {torch.float16: 0.25, torch.bfloat16: 0.25}


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


def saved_tensor_hooks_active() -> bool:
    """Whether tensors that are saved for backward pass through hooks: non-reentrant checkpointing, offloading."""
    # No public name tells; without this one the hooks are assumed, which is safe: torch then checks versions itself.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
