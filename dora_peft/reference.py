"""DoRA in plain PyTorch: the algorithm, and the truth that every faster path is tested against.

DoRA (https://arxiv.org/abs/2402.09353) splits a frozen weight into a magnitude per output row and a direction, trains
the magnitude directly and the direction through a low-rank change (Eq. 5):

    W' = m * (W0 + s B A) / ||W0 + s B A||        norm per output row
    y  = x W'^T + b

Symbols, the same in every file of this package:

    weight       W0  [out, in]   frozen
    lora_A       A   [r, in]     trained
    lora_B       B   [out, r]    trained
    scaling      s   float       lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
    magnitude    m   [out]       trained, initialised to ||W0 + s B A||
    weight_norm  v   [out]       ||W0 + s B A|| per output row
    scale        c   [out]       m / v
    bias         b   [out]       never scaled

Everything here builds the dense [out, in] matrices, which is what a fast path must not do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def alpha_divisor(r: int, use_rslora: bool) -> float:
    """What lora_alpha is divided by to give s: r, or sqrt(r) with rsLoRA."""
    return math.sqrt(r) if use_rslora else r


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v = ||W0 + s B A|| per output row: [out]."""
    return torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1)


def scale(magnitude: Tensor, weight_norm: Tensor, tied: Tensor | None = None) -> Tensor:
    """c = m / v per output row: [out]; 1 on `tied` rows.

    A row is tied when v was 0 at its creation (a zero row of W0): its magnitude follows its norm, so that it trains as
    plain LoRA. The division would give NaN there.
    """
    if tied is None:
        return magnitude / weight_norm
    return torch.where(tied, torch.ones_like(magnitude), magnitude / weight_norm.masked_fill(tied, 1.0))


def dora_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    tied: Tensor | None = None,
    detach_norm: bool = True,
) -> Tensor:
    """W' = c * (W0 + s B A): [out, in].

    With `detach_norm` the norm is a constant of the backward pass (sec. 4.3 of the paper): no gradient flows through v.
    """
    norm = weight_norm(weight, lora_A, lora_B, scaling)
    if detach_norm:
        norm = norm.detach()
    return scale(magnitude, norm, tied)[:, None] * (weight + scaling * (lora_B @ lora_A))


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropped: Tensor | None = None,
    dropout_mode: str = "branch",
    tied: Tensor | None = None,
    detach_norm: bool = True,
) -> Tensor:
    """y for x [..., in]: [..., out]. `dropped` is drop(x), the input of the low-rank branch; x if that is None.

    dropout_mode "branch" drops the low-rank branch only, as in LoRA:

        y = c * (x W0^T + s drop(x) A^T B^T) + b

    "paper" also drops the part of the base product that c adds, as the paper's code and PEFT do:

        y = x W0^T + (c - 1) * (drop(x) W0^T) + c * s drop(x) A^T B^T + b

    Both have the same expectation, and are the same without dropout.
    """
    dropped = x if dropped is None else dropped
    norm = weight_norm(weight, lora_A, lora_B, scaling)
    if detach_norm:
        norm = norm.detach()
    c = scale(magnitude, norm, tied)
    low_rank = scaling * F.linear(F.linear(dropped, lora_A), lora_B)
    if dropout_mode == "branch":
        y = c * (F.linear(x, weight) + low_rank)
    elif dropout_mode == "paper":
        y = F.linear(x, weight) + (c - 1) * F.linear(dropped, weight) + c * low_rank
    else:
        raise ValueError(f"dropout_mode must be 'branch' or 'paper', found {dropout_mode!r}")
    return y if bias is None else y + bias


def weighted_sum(weight: Tensor, adapters: list[tuple[Tensor, Tensor, Tensor, float]], weights: list[float]) -> Tensor:
    """W0 + sum_i w_i (W'_i - W0): what a weighted sum of DoRA adapters (A, B, m, s) means, [out, in]."""
    combined = weight.clone()
    for (lora_A, lora_B, magnitude, scaling), w in zip(adapters, weights, strict=True):
        combined += w * (dora_weight(weight, lora_A, lora_B, magnitude, scaling) - weight)
    return combined
