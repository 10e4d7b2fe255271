"""Merging and combining adapters without an [out, in] temporary: rows of W', weighted sums, truncation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merged_rows(
    rows: Tensor,
    start: int,
    stop: int,
    adapters: list[tuple[Tensor, Tensor, float, Tensor]],
    out: Tensor | None = None,
) -> Tensor:
    """Rows start:stop of W' = c_n (... c_1 (W0 + s_1 B_1 A_1) ... + s_n B_n A_n) for adapters (A, B, s, c).

    Args:
        out: Where to write them, which may be `rows`; for at least one adapter.
    """
    for lora_A, lora_B, scaling, c in adapters:
        rows = out = torch.addmm(rows, lora_B[start:stop], lora_A, alpha=scaling, out=out).mul_(c[start:stop, None])
    return rows


def rows_and_factors(adapters: list[tuple[Tensor, Tensor, float, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """W' = diag(c) W0 + B A of adapters (A, B, s, c) in order: c [out], A [sum r_i, in] and B [out, sum r_i].

    W' = c_2 (c_1 (W0 + s_1 B_1 A_1) + s_2 B_2 A_2): each B_i takes s_i and the c of its own and all later adapters.
    """
    scale = torch.ones_like(adapters[0][3])
    ups: list[Tensor] = []
    for _, lora_B, scaling, c in reversed(adapters):
        scale = scale * c
        ups.insert(0, (scaling * scale)[:, None] * lora_B)
    return scale, torch.cat([lora_A for lora_A, *_ in adapters]), torch.cat(ups, 1)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity; without one of its size beside it."""
    return not tensor.numel() or math.isfinite(torch.linalg.vector_norm(tensor, torch.inf).item())


def weighted_sum(
    adapters: list[tuple[Tensor, Tensor, float, Tensor]], weights: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum W0 + sum_i w_i (W'_i - W0) of adapters (A, B, s, c) as one DoRA adapter, without loss.

    With k = 1 + sum_i w_i (c_i - 1) per row the sum is k * (W0 + sum_i (w_i s_i c_i / k) B_i A_i), which is a DoRA
    weight whose scale is k and whose factors are the stacked ones.

    Returns:
        lora_A [sum r_i, in], lora_B [out, sum r_i] (scaling 1) and k [out]; the magnitude is k * ||W0 + B A||.
    """
    k = torch.ones_like(adapters[0][3])
    for (_, _, _, c), w in zip(adapters, weights, strict=True):
        k = k + w * (c - 1)
    # a row whose scale is exactly 0 has no direction; any tiny k gives the same weight up to rounding
    k = torch.where(k.abs() < torch.finfo(k.dtype).eps, torch.finfo(k.dtype).eps, k)
    lora_A = torch.cat([A.to(k.dtype) for A, _, _, _ in adapters])
    lora_B = torch.cat([(w * s * c / k)[:, None] * B for (_, B, s, c), w in zip(adapters, weights, strict=True)], 1)
    return lora_A, lora_B, k


def truncate(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation of B A (truncated SVD through two thin QR decompositions, no [out, in])."""
    # [out, k] and [k, r], [in, k] and [k, r]
    q_B, r_B = torch.linalg.qr(lora_B)
    q_A, r_A = torch.linalg.qr(lora_A.T)
    u, sigma, vh = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    return (root[:, None] * vh[:rank]) @ q_A.T, q_B @ (u[:, :rank] * root)
