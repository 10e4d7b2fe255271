"""The linear layer's autograd function by Triton's kernels; linear_autograd.py has the equations and what is kept.

A GPU waits for the host if Python takes longer than the kernels. So the usual case, a dense weight and all of A, B and
m trained, goes by what was worked out for the layout of its tensors (kernels/plan.py); all else by `fused.forward` and
`fused.gradients`, which take any.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import torch_names
from .content import version
from .kept_output import KeptOnDevice, KeptOutput, is_kept_plainly
from .linear_parts import flattened, in_dtype, magnitude_gradient, run_backward, z_at
from .options import Options
from .torch_names import unsafe_view


def apply(
    x: Tensor,
    base_out: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    weight: Tensor | None,
    options: Options,
    norm: Tensor | None,
) -> Tensor:
    """`linear_autograd.apply` for options with kernels."""
    if torch_names.transforming():
        function = _LinearByKernels.apply
    else:
        function, x = _apply, torch_names.unwrap_dead(x)
    if options.autocast_dtype is None:
        return function(x, base_out, bias, lora_A, lora_B, c, weight, options, norm)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, base_out, bias, lora_A, lora_B, c, weight, options, norm)


class _LinearByKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base_out, bias, lora_A, lora_B, c, weight, options, norm):
        kernels, p = options.kernels, options.dropout_p
        if norm is not None:
            c = c / norm
        # the mask is drawn from it
        seed = kernels.draw_seed(x.device) if p > 0 else None
        plan = None
        if base_out is None and x.dtype is options.dtype and (seed is None or type(seed) is int):
            plan = kernels.plan_for(x, weight, bias, lora_A, lora_B, c, p)
        if plan is None:
            y, u = _forward(ctx, x, base_out, bias, lora_A, lora_B, c, weight, options, seed)
        else:
            ctx.k = float(options.scaling / plan.kept) if plan.kept else 0.0
            y, u = plan.forward(x, weight, bias, lora_A, lora_B, c, ctx.k, seed)
        ctx.plan, ctx.seed, ctx.kept, saved = plan, seed, None, []
        if ctx.needs_input_grad[5]:
            if plan is not None and is_kept_plainly(options.outputs):
                ctx.kept = KeptOnDevice(y, options.outputs, plan)
                saved, ctx.kept.sample = [ctx.kept.sample], None
            else:
                ctx.kept = KeptOutput(y, options.outputs, kernels)
                saved, ctx.kept.saved = ctx.kept.saved, []
        ctx.save_for_backward(x, u, bias, lora_A, lora_B, c, *saved)
        # not among the saved tensors: offloading would move W0 with them
        ctx.weight, ctx.options, ctx.dtype, ctx.norm, ctx.weight_version = (
            weight,
            options,
            y.dtype,
            norm,
            version(weight),
        )
        return y

    @staticmethod
    def backward(ctx, grad):
        return *run_backward(ctx, grad, _gradients), None, None, None


_apply = torch_names.apply_of(_LinearByKernels)


def _forward(ctx, x, base_out, bias, lora_A, lora_B, c, weight, options, seed):
    """y [..., out] and u [N, r] of any layout."""
    # [N, in]
    rows = in_dtype(flattened(x), options.dtype)
    by_kernels = options.kernels.KernelOptions.of(options.scaling, options.dropout_p, seed, ())
    ctx.k, base_rows = by_kernels.k, None if weight is not None else flattened(base_out)
    y, u = options.kernels.forward(rows, base_rows, weight, bias, lora_A, lora_B, c, by_kernels)
    return (y if x.dim() == 2 else unsafe_view(y, [*x.shape[:-1], y.shape[-1]])), u


def _gradients(ctx, grad):
    """Those of x, base_out, bias, A, B and c."""
    x, u, bias, lora_A, lora_B, c, *saved = ctx.saved_tensors
    needed = need_x, need_base, need_bias, need_A, need_B, _ = ctx.needs_input_grad[:6]
    kept, outputs = ctx.kept, ctx.options.outputs
    y = gone = None
    if type(kept) is KeptOnDevice:
        sample = saved[0]
        y, written = kept.read(sample, grad)
        if written and outputs.asks():
            outputs.notice_later(ctx.options.kernels.changed(sample))
        if y is not None and need_A and need_B and not (need_bias or need_base) and grad.is_contiguous():
            dx, *others = ctx.plan.gradients(
                grad, y, x, u, ctx.weight, bias, lora_A, lora_B, c, ctx.k, ctx.seed, sample, need_x
            )
            return dx, None, None, *others
        gone = None if y is None else ctx.options.kernels.changed(sample)
    elif kept is not None:
        y, gone = kept.read(saved, grad)
    return _gradients_of_any_layout(ctx, grad, needed, x, u, bias, lora_A, lora_B, c, y, gone)


def _gradients_of_any_layout(ctx, grad, needed, x, u, bias, lora_A, lora_B, c, y, gone):
    base_product, kernels = ctx.options.base_product, ctx.options.kernels
    g, rows = flattened(grad), in_dtype(flattened(x), ctx.dtype)
    y = None if y is None else flattened(y)
    weight = None if ctx.weight is None else in_dtype(ctx.weight, ctx.dtype)

    def d_magnitude(sums: Tensor | None) -> Tensor:
        return magnitude_gradient(sums, g, y, c, bias, partial(z_at, ctx, x, u, lora_B, c))

    stored = ctx.weight
    if stored is None and needed[5] and hasattr(base_product, "stored"):
        stored = base_product.stored()
    options = kernels.KernelOptions.of(ctx.options.scaling, ctx.options.dropout_p, ctx.seed, needed)
    dx, d_base, *others = kernels.gradients(
        g, rows, u, y, weight, bias, lora_A, lora_B, c, options, stored=stored, d_magnitude=d_magnitude, gone=gone
    )  # fmt: skip
    dx = None if dx is None else dx.view(x.shape)
    return dx, None if d_base is None else d_base.view(grad.shape), *others
