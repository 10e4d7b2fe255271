"""DoRA's linear layer on tensors, in training, in evaluation, and as an operator for torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import choice
from .linear_autograd import apply, flattened
from .options import Options, ProductOfRows, options_for
from .overwritten import Outputs
from .products import multiply_many
from .scaled_sum import scaled_sum


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
    base_product: ProductOfRows | None = None,
    dropout_p: float = 0.0,
    composed: Tensor | None = None,
    outputs: Outputs | None = None,
) -> Tensor:
    """y = c * (x W0^T + s drop(x) A^T B^T) + b; in one line `c * (x @ W0.T + s * drop(x) @ A.T @ B.T) + b`.

    Give either `weight`, or `base_out` and `base_product` if W0 is at hand as a product only.

    Args:
        x: [..., in].
        lora_A, lora_B: [r, in] and [out, r], of any floating dtype.
        c: [out] = m / v, fp32 or fp64; carries the gradient of m (and of v, unless that is detached).
        scaling: s.
        weight: W0 [out, in], frozen; may be a transposed view.
        bias: b [out].
        base_out: x W0^T + b [..., out] from the base layer, whose own backward gives its part of dx.
        base_product: Gives x W0^T without b for rows `index` of W0 (all if None), in the rare cases in which y does not
            determine it, see linear_autograd.py. May have a method `stored` that gives W0 to kernels, see
            `BaseWeight.stored`.
        dropout_p: Probability to drop an element of x before A.
        composed: W0 + s B A [out, in] in x's dtype, if the caller has just computed it and needs it no more: it is
            overwritten.
        outputs: What is known about the layer's outputs, kept between calls.

    Returns:
        [..., out] in x's dtype, under autocast in autocast's. Differentiable once, with respect to x, base_out, bias,
        lora_A, lora_B and c.
    """
    options = options_for(x, lora_A, lora_B, c, scaling, weight, base_out, base_product, dropout_p, outputs)
    return apply(x, base_out, bias, lora_A, lora_B, c, weight, composed, options)


def linear_eval(
    x: Tensor,
    lora_A: Tensor,
    folded_B: Tensor,
    c: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    alpha: float = 1.0,
    options: Options | None = None,
) -> Tensor:
    """`linear` without dropout and gradients, from `folded_B` [out, r], which is computed once.

    Args:
        folded_B: c * B with `alpha` = s gives the bits of `linear` by torch's operations, s c * B those by kernels.
        alpha: What the low-rank branch is multiplied by, see `folded_B`.
        options: What `options_for` gives for these arguments, if the caller knows it already.
    """
    if options is None:
        options = options_for(x, lora_A, folded_B, c, 1.0, weight, base_out, None, 0.0, None)
    if options.autocast_dtype is not None and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return linear_eval(
                x, lora_A, folded_B, c, weight=weight, bias=bias, base_out=base_out, alpha=alpha, options=options
            )  # fmt: skip
    rows, dtype, products = flattened(x).to(options.dtype), options.dtype, options.products
    u = (multiply_many if len(rows) >= products.thin_in else F.linear)(rows, lora_A.to(dtype))
    if weight is not None:
        multiply = multiply_many if len(rows) >= products.wide else F.linear
        z = out = multiply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        assert base_out is not None
        z = flattened(base_out)
        out = torch.empty_like(z)
    # with kernels `folded_B` holds s, unless it was folded before it was known that they run
    if options.kernels is not None and alpha == 1.0:
        y = options.kernels.compose_folded(z, u, folded_B, c, bias, in_place=base_out is None)
    else:
        y = scaled_sum(z, u, folded_B, c, bias, out=out, alpha=alpha)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


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
        places: Seed of the places of y that are compared to find out whether it was overwritten.
    """
    choice.load_operators()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if p > 0 else None
    return torch.ops.dora_peft.linear(x, weight, bias, lora_A, lora_B, c, seed, scaling, p, places)[0]
