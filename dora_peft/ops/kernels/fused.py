"""The linear layer by Triton kernels: forward, backward, and the sum of evaluation.

Per adapted layer at equal dtypes and without dropout, beside c = m / v:

    forward   x W0^T + b, x A^T, and one kernel that writes y over the first
    backward  one pass that reads g and y, writes g' = c * g and sums g (y - b); the magnitude's gradient from the sums;
              g'^T u, g' B, du^T x, g' W0, and du A accumulated into that

ops/linear_autograd.py makes an autograd function of it, with the equations and what is kept between the two;
operators.py makes operators for torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bases import FourBit
from ..linear_parts import in_dtype
from . import dropout as dropout_kernels
from . import linear as kernels
from .dropout import draw_seed
from .options import KernelOptions, Seed
from .plan import Plan, plan_for
from .sample import changed, compare_sample, take_sample

__all__ = [
    "KernelOptions",
    "Plan",
    "Seed",
    "changed",
    "compare_sample",
    "compose_folded",
    "draw_seed",
    "forward",
    "gradients",
    "plan_for",
    "take_sample",
]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    rows: Tensor,
    base_out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    options: KernelOptions,
) -> tuple[Tensor, Tensor]:
    """y = c * (x W0^T + k u B^T) + b and u = (mask * x) A^T.

    Args:
        rows: x [N, in].
        base_out: x W0^T + b [N, out]; None if `weight` is given.
        weight: W0 [out, in]; None if `base_out` is given.
        bias: b [out].
        lora_A, lora_B: [r, in] and [out, r].
        c: [out].

    Returns:
        [N, out] and [N, r], in x's dtype.
    """
    dtype = rows.dtype
    if options.seed is None:
        u = F.linear(rows, in_dtype(lora_A, dtype))
    else:
        u = dropout_kernels.dropped_product(rows, _rowwise(lora_A), options.seed, options.p)
    if weight is not None:
        z = out = F.linear(rows, in_dtype(weight, dtype), None if bias is None else in_dtype(bias, dtype))
    else:
        assert base_out is not None
        z = _rowwise(base_out)
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
    return kernels.scaled_sum(z, u, _rowwise(lora_B), c, bias, options.k, out=out), u


def compose_folded(z: Tensor, u: Tensor, folded_B: Tensor, c: Tensor, bias: Tensor | None, *, in_place: bool) -> Tensor:
    """y = c * (z - b) + u folded_B^T + b for evaluation; equals `forward` for folded_B = s c B.

    Args:
        z: x W0^T + b [N, out].
        u: x A^T [N, r], in z's dtype.
        folded_B: [out, r].
        c, bias: [out].
        in_place: Write y over z.

    Returns:
        [N, out], in z's dtype.
    """
    z = _rowwise(z)
    return kernels.scaled_sum(z, u, _rowwise(folded_B), c, bias, None, out=z if in_place else torch.empty_like(z))


def gradients(
    g: Tensor, rows: Tensor, u: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    lora_A: Tensor, lora_B: Tensor, c: Tensor, options: KernelOptions, *,
    stored: Tensor | FourBit | None, d_magnitude: Callable[[Tensor | None], Tensor], gone: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of x [N, in], base_out, bias, A, B and c; None for those that are not `options.needed`, in this order.

        g' = c * g          du = k g' B          dx = g' W0 + mask * (du A)
        dA = du^T (mask * x)          dB = k g'^T u          dc: see `magnitude_gradient`

    Args:
        g: dL/dy [N, out].
        rows, u, weight, bias, lora_A, lora_B, c: As `forward` takes and gives them.
        y: The layer's output [N, out], None if it was overwritten since.
        stored: W0, see `BaseWeight.stored`; None if it is neither dense nor 4-bit.
        d_magnitude: Falls back to the gradient of c without kernels, if y was overwritten or `stored` is None: takes
            sum_n g (y - b), or None if y is None.
        gone: A number [1] on the device that is not 0 if y was overwritten, see `KeptOutput.read`.
    """
    need_x, need_base, need_bias, need_A, need_B, need_c = options.needed
    k, dtype = options.k, rows.dtype
    y = None if y is None else _rowwise(y)
    # [N, out], [stripes, out]
    scaled, sums = kernels.scale_and_sum(g, c, y if need_c else None, bias)
    dx = d_bias = d_A = d_B = d_c = None
    if need_c and sums is not None and y is not None and stored is not None:
        # [out]
        d_c = kernels.magnitude_gradient(sums, g, y, rows, stored, u, _rowwise(lora_B), c, bias, k, gone)
    elif need_c:
        # waits for the host, as all of this fallback does
        overwritten = sums is None or (gone is not None and bool(gone))
        d_c = d_magnitude(None if overwritten or sums is None else sums.sum(0))
    B = in_dtype(lora_B, dtype)
    if need_B:
        # [out, r]; B gives the shape alone
        d_B = torch.addmm(B, scaled.T, u, beta=0, alpha=k)
    if need_A or need_x:
        # [N, r]
        du = torch.addmm(u, scaled, B, beta=0, alpha=k)
        d_A = _gradient_of_A(du, rows, lora_A, options) if need_A else None
        dx = _gradient_of_x(scaled, du, weight, lora_A, options) if need_x else None
    if need_bias:
        d_bias = g.sum(0, dtype=c.dtype)
        # without `weight` the rest comes through base_out
        d_bias = (1 - c) * d_bias if weight is None else d_bias
    return dx, scaled if need_base else None, d_bias, d_A, d_B, d_c


def _gradient_of_A(du: Tensor, rows: Tensor, lora_A: Tensor, options: KernelOptions) -> Tensor:
    """du^T (mask * x) [r, in]."""
    if options.seed is None:
        return du.T @ rows
    return dropout_kernels.dropped_gradient(du, rows, options.seed, options.p, lora_A.dtype)


def _gradient_of_x(scaled: Tensor, du: Tensor, weight: Tensor | None, lora_A: Tensor, options: KernelOptions) -> Tensor:
    """g' W0 + mask * (du A) [N, in]; without the first if W0 is not given."""
    dx = None if weight is None else scaled @ in_dtype(weight, du.dtype)
    if options.seed is not None:
        return dropout_kernels.add_low_rank(dx, du, _rowwise(lora_A), options.seed, options.p)
    lora_A = in_dtype(lora_A, du.dtype)
    return du @ lora_A if dx is None else dx.addmm_(du, lora_A)


def _rowwise(matrix: Tensor) -> Tensor:
    """The kernels step through these rows without a stride."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
