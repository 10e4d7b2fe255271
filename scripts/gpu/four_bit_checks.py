"""Layers over bitsandbytes' 4-bit weights, which the kernels read as they are stored."""

from __future__ import annotations

import torch
from torch import nn

from gpu.problem import BF16, FP32, Problem, randn
from gpu.registry import Figures, Skipped


def quantised(device: torch.device, *, nested: bool) -> nn.Module:
    """An nf4 layer [128, 64] that computes in bf16."""
    try:
        import bitsandbytes as bnb
    # a bitsandbytes without a library for this machine raises other errors than ImportError
    except Exception as error:
        raise Skipped(f"bitsandbytes cannot be imported: {type(error).__name__}: {str(error)[:200]}") from None
    layer = bnb.nn.Linear4bit(64, 128, bias=True, compute_dtype=BF16, quant_type="nf4", compress_statistics=nested)
    weight = (randn(128, 64, seed=0, device=torch.device("cpu")) / 8).to(BF16)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    layer.bias = nn.Parameter((0.1 * randn(128, seed=1, device=torch.device("cpu"))).to(BF16), requires_grad=False)
    layer = layer.to(device)
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize(device)
    return layer


def four_bit_layer(device: torch.device, figures: Figures) -> None:
    """Forward and all gradients, over W0 as bitsandbytes dequantises it; `nested` statistics are QLoRA's."""
    for nested in (False, True):
        base, label = quantised(device, nested=nested), "nested: " if nested else ""
        problem = Problem(device, BF16, FP32, base=base)
        problem.compare(figures, weight=problem.layer.base_weight().dense(), label=label)
    with torch.no_grad():
        base.bias[::3] = 300.0
    problem.compare(figures, weight=problem.layer.base_weight().dense(), label="bias hides y: ")
