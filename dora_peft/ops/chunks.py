"""One pass over many tokens, so few at a time that what is made of them stays in the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from . import torch_names
from .workspace import workspace

# Tokens that the element-wise passes take at once on a CPU: their temporaries stay in the cache, and a fresh
# [N, out] allocation, whose page faults cost more than its arithmetic, is not made for every layer. With fewer the
# products suffer: by 2 % at 512, 10 % at 256.
CHUNK = 1024
# Elements up to which sums alone are faster by `in_one_pass`, which keeps nothing in the cache.
ONE_PASS = 2**20
# Elements that a sum over tokens runs in side by side: half of a core's cache.
LANES = 2**18


def in_one_pass(g: Tensor, c: Tensor, y: Tensor, bias: Tensor | None, *, scale: bool) -> tuple[Tensor | None, Tensor]:
    """g' = c * g [N, out] if `scale`, and sum_n g (y - b) [out], both in one pass over g and y [N, out].

    They are the gradients of batch normalisation in evaluation, for a variance of 1 and y as its input: one operation
    of torch's, which reads g once. It adds up token after token, so that it is for no more than CHUNK of them.
    """
    zeros, ones = _mean_and_variance(len(c), c.dtype)
    mean, wanted = zeros if bias is None else bias, [scale, True, False]
    scaled, sums, _ = torch_names.batch_norm_backward(g, y, c, mean, ones, None, None, False, 0.0, wanted)
    return scaled if scale else None, sums


@lru_cache(maxsize=64)
def _mean_and_variance(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """0 and 1 [width] on the CPU."""
    with torch.inference_mode(False):
        return torch.zeros(width, dtype=dtype, device="cpu"), torch.ones(width, dtype=dtype, device="cpu")


def does_one_pass(g: Tensor, c: Tensor, y: Tensor, bias: Tensor | None, *, scale: bool) -> bool:
    """Whether `in_one_pass` takes these, and is the faster way."""
    if not g.is_cpu or not 0 < len(g) <= CHUNK or not g.dtype is y.dtype is c.dtype:
        return False
    if bias is not None and bias.dtype is not c.dtype:
        return False
    return scale or g.numel() <= ONE_PASS


def in_chunks(
    g: Tensor,
    c: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor],
    keep_scaled: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g' = c * g, its product with W0, and sum_n g (y - b), see `linear_parts.scale_and_sum`.

    Args:
        y: [N, out].
    """
    length, width = g.shape
    step = chunk(length, g.device) if length else 1
    inner = min(step, max(1, LANES // width)) if g.device.type == "cpu" else step
    product, scaled, buffer, lanes = None, None, None, None
    if weight is not None and length != step:
        product = g.new_empty(length, weight.shape[1])
    if keep_scaled:
        scaled = torch.empty_like(g, memory_format=torch.contiguous_format)
    elif weight is not None:
        buffer = workspace("scaled", (min(step, length), width), g)
    for start in range(0, length, step):
        stop = min(start + step, length)
        target = scaled[start:stop] if scaled is not None else buffer
        for low in range(start, stop, inner):
            high = min(low + inner, stop)
            part = g[low:high]
            if y is not None:
                lanes = _add_product(lanes, part, y[low:high], bias, c)
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


def _add_product(sums: Tensor | None, g: Tensor, y: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
    """sums + g (y - b) [N, out] in c's dtype, in place if there are sums, of at least as many tokens."""
    dtype = c.dtype
    if bias is not None:
        y = y.to(dtype) - bias
    if sums is None:
        return torch.mul(g.to(dtype), y, out=workspace("sums", tuple(g.shape), c))
    part = sums[: len(g)]
    if g.dtype is y.dtype is dtype:
        part.addcmul_(g, y)
    else:
        part.add_(g.to(dtype, copy=True).mul_(y))
    return sums


def chunk(length: int, device: torch.device) -> int:
    """How many of `length` tokens to take at once: equal parts of at most CHUNK on a CPU, all elsewhere."""
    return -(-length // -(-length // CHUNK)) if device.type == "cpu" else length
