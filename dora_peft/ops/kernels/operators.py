"""The linear layer as operators for torch.compile: torch.ops.dora_peft.linear and its backward pass.

The compiler sees through neither the kernels nor an autograd function that keeps its output. An operator's schema takes
tensors and numbers alone, so what `KernelOptions` bundles stands apart here; `needed` is a number whose bits say which
gradients are needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kept_output
from . import fused
from .options import KernelOptions

# Of x, bias, A, B and c; the operator has no base_out.
_NEEDED = 5


@torch.library.custom_op("dora_peft::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    seed: Tensor | None,
    scaling: float,
    p: float,
    places: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, u, and copies of parts of y, from which the backward pass finds out whether it was overwritten."""
    options = KernelOptions.of(scaling, p, seed, ())
    y, u = fused.forward(x.reshape(-1, x.shape[-1]), None, weight, bias, lora_A, lora_B, c, options)
    rows, diagonal = fused.take_sample(y, *kept_output.sampled_by(y.shape, places))
    return y.view(*x.shape[:-1], len(weight)), u, rows.view(kept_output.sample_sizes(*y.shape)[0], y.shape[1]), diagonal


@_linear.register_fake
def _(x, weight, bias, lora_A, lora_B, c, seed, scaling, p, places):
    length, width = math.prod(x.shape[:-1]), weight.shape[0]
    rows, diagonal = kept_output.sample_sizes(length, width)
    return (
        x.new_empty(*x.shape[:-1], width),
        x.new_empty(length, lora_A.shape[0]),
        x.new_empty(rows, width),
        x.new_empty(diagonal),
    )


@torch.library.custom_op("dora_peft::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    y: Tensor,
    rows: Tensor,
    diagonal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    seed: Tensor | None,
    scaling: float,
    p: float,
    places: int,
    needed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, *others = _unpacked(needed)
    outputs = y.reshape(-1, y.shape[-1])
    gone = fused.compare_sample(outputs, rows, diagonal, *kept_output.sampled_by(outputs.shape, places)[:3])
    dx, _, d_bias, d_A, d_B, d_c = fused.gradients(
        grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), u, outputs, weight, bias,
        lora_A, lora_B, c, KernelOptions.of(scaling, p, seed, (need_x, False, *others)),
        stored=weight, d_magnitude=_never, gone=gone,
    )  # fmt: skip
    # an operator returns a tensor for each output, and no two that share memory
    none = c.new_empty(0)
    return (
        none if dx is None else dx.view(x.shape),
        none.clone() if d_bias is None or bias is None else d_bias.to(bias.dtype),
        none.clone() if d_A is None else d_A.to(lora_A.dtype),
        none.clone() if d_B is None else d_B.to(lora_B.dtype),
        none.clone() if d_c is None else d_c,
    )


def _never(_: Tensor | None) -> Tensor:
    raise AssertionError("the operators have y and a dense weight")


@_linear_backward.register_fake
def _(grad, x, u, y, rows, diagonal, weight, bias, lora_A, lora_B, c, seed, scaling, p, places, needed):
    need_x, need_bias, need_A, need_B, need_c = _unpacked(needed)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else c.new_empty(0),
        torch.empty_like(bias) if need_bias else c.new_empty(0),
        torch.empty_like(lora_A, memory_format=torch.contiguous_format) if need_A else c.new_empty(0),
        torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_B else c.new_empty(0),
        torch.empty_like(c) if need_c else c.new_empty(0),
    )


def _packed(needed: tuple[bool, ...]) -> int:
    """The number whose bit i says whether output i is needed."""
    return sum(need << i for i, need in enumerate(needed))


def _unpacked(needed: int) -> tuple[bool, ...]:
    return tuple(bool(needed >> i & 1) for i in range(_NEEDED))


def _keep(ctx, inputs, output):
    x, weight, bias, lora_A, lora_B, c, seed, ctx.scaling, ctx.p, ctx.places = inputs
    y, u, rows, diagonal = output
    ctx.save_for_backward(x, u, y, rows, diagonal, weight, bias, lora_A, lora_B, c, seed)
    ctx.mark_non_differentiable(u, rows, diagonal)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    need_x, _, *others = ctx.needs_input_grad[:6]
    needed = (need_x, *others)
    out = torch.ops.dora_peft.linear_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.p, ctx.places, _packed(needed))
    dx, d_bias, d_A, d_B, d_c = (d if need else None for d, need in zip(out, needed, strict=True))
    return dx, None, d_bias, d_A, d_B, d_c, None, None, None, None


_linear.register_autograd(_backward, setup_context=_keep)
