"""Which library multiplies: contenders are compared under the same one as well.

default   as each of them is: torch's products for LoRA, ours wherever ops/products.py chooses otherwise
torch     torch.backends.mkldnn off: all products of both by the library that torch's F.linear takes (MKL on x86)
same      all products of both by what ops/products.py chooses: `F.linear` itself is routed through it
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_peft.ops import products

LIBRARIES = ("default", "torch", "same")
_linear = F.linear


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W0^T + b [N, out] by the library that ops/products.py chooses for so many rows x [N, in]."""
    chosen = len(rows) >= products.least_rows(weight.numel(), rows.dtype, rows.device)
    return products.multiply_many(rows, weight, bias) if chosen else _linear(rows, weight, bias)


class _Routed(torch.autograd.Function):
    """F.linear, whose forward and backward products go through `_multiply`; a trained weight has no bias."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _multiply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g, dx, d_weight = grad.reshape(-1, grad.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            dx = _multiply(g, weight.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = _multiply(g.T, x.reshape(-1, x.shape[-1]).T)
        return dx, d_weight, None


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the place of F.linear."""
    if x.dtype is not torch.float32 or (bias is not None and bias.requires_grad):
        return _linear(x, weight, bias)
    return _Routed.apply(x, weight, bias)


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """Let this library multiply."""
    if name == "torch":
        # not by `flags`, which sets what else it knows of as well
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            yield
        finally:
            torch.backends.mkldnn.enabled = before
    elif name == "same":
        F.linear = torch.nn.functional.linear = routed_linear
        try:
            yield
        finally:
            F.linear = torch.nn.functional.linear = _linear
    else:
        yield
