"""The measurement of dM and dD for one module, as `dora_peft.analysis` defines them.

No norm is subtracted from a norm, and no cosine from 1, so that a change of 1e-8 is measured as well as one of 1, but
for its direction if D is nearly parallel to W0. With D = W - W0, w = ||W0||, a = <W0, D>, d = ||D|| and v = ||W||, all
per row and in float64:

    v - w = (2 a + d^2) / (v + w)        1 - cos = (w^2 d^2 - a^2) / (v w (v w + w^2 + a))

For D = s B A, a = s rowsum((W0 A^T) * B) and d^2 = s^2 rowsum((B A A^T) * B): no [out, in] matrix is built, and W0 is
read in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases import BaseWeight, Dense

# Rows of one weight in float64; three such blocks are alive together.
BLOCK_BYTES = 16 * 2**20
# v^2 / (w^2 + d^2) below which a row of W counts as zero: what is left there is the rounding of float64.
ZERO = 1e-13


class Change(NamedTuple):
    """What training did to one module: dM, in the unit of the weight, and dD, from 0 to 2."""

    magnitude: float
    direction: float


def compare_weights(weight0: Tensor | BaseWeight, weight: Tensor | BaseWeight) -> Change:
    """The change from `weight0` to `weight`, read in blocks of rows.

    Args:
        weight0, weight: [out, in], a kernel [out, ...], which is flattened, or the seam to either.

    Raises:
        ValueError: The shapes differ.
    """
    base, trained = _seam(weight0), _seam(weight)
    shapes = [(seam.out_features, seam.in_features) for seam in (base, trained)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expected a weight of shape {shapes[0]}, as the pretrained one's, found {shapes[1]}")
    sums = []
    for (_, _, rows), (_, _, change) in zip(_blocks(base), _blocks(trained), strict=True):
        rows = rows.to(change.device)
        change = change - rows
        sums.append(torch.stack([_dot(rows, rows), _dot(rows, change), _dot(change, change)]).cpu())
    return change_of(*torch.cat(sums, dim=1))


def compare_low_rank(
    base: Tensor | BaseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Change:
    """The change from W0 to W0 + s B A, or to m (W0 + s B A) / ||W0 + s B A||, without a matrix of size [out, in].

    Args:
        base: W0 [out, in], or the seam to it (`dora_peft.bases.base_weight`).
        lora_A: A [r, in].
        lora_B: B [out, r].
        scaling: s.
        magnitude: DoRA's m, [out] or any shape of `out` elements; None for LoRA.

    Raises:
        ValueError: The shapes do not fit.
    """
    return change_of(*low_rank_sums(_seam(base), lora_A, lora_B, scaling), magnitude)


def low_rank_sums(base: BaseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """w^2, a and d^2 of W0 + s B A, each [out] in float64 on the CPU."""
    out, inner, r = base.out_features, base.in_features, len(lora_A)
    if (lora_A.shape, lora_B.shape) != ((r, inner), (out, r)):
        raise ValueError(
            f"expected A [r, {inner}] and B [{out}, r] for a weight of {out} x {inner}, found A {list(lora_A.shape)} "
            f"and B {list(lora_B.shape)}; take the base model that the adapter was trained on."
        )
    A, B = (factor.detach().to(base.device, torch.float64) for factor in (lora_A, lora_B))
    change2 = scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
    if base.has_rows:
        parts = [(_dot(rows, rows), _dot(rows @ A.T, B[start:stop])) for start, stop, rows in _blocks(base)]
        base2, dot = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        # only a linear map, in the precision in which it computes
        base2, dot = base.row_norms_squared().double(), _dot(base.times(A.to(base.dtype)).double(), B)
    return base2.cpu(), scaling * dot.cpu(), change2.cpu()


def _seam(weight: Tensor | BaseWeight) -> BaseWeight:
    return Dense(weight, lambda w: w.flatten(1)) if isinstance(weight, Tensor) else weight


def _blocks(base: BaseWeight) -> Iterator[tuple[int, int, Tensor]]:
    step = max(1, BLOCK_BYTES // (8 * base.in_features))
    for start in range(0, base.out_features, step):
        stop = min(start + step, base.out_features)
        # the blocks of a grouped convolution hold the channels of one group only
        if getattr(base, "groups", 1) > 1:
            yield start, stop, base.rows(torch.arange(start, stop, device=base.device)).double()
        else:
            yield start, stop, base.block(start, stop).double()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    # a batched product: x * y is not stored
    return torch.einsum("oi,oi->o", x, y)


def change_of(base2: Tensor, dot: Tensor, change2: Tensor, magnitude: Tensor | None = None) -> Change:
    """dM and dD from w^2, a and d^2, each [out]."""
    total2 = base2 + 2 * dot + change2
    total2 = total2.masked_fill(total2 <= ZERO * (base2 + change2), 0.0)
    w, v = base2.sqrt(), total2.sqrt()
    # `cosine` is the cosine times w v. If it is negative, w v - cosine adds two positive numbers, and the other form
    # would subtract them.
    product, cosine = w * v, base2 + dot
    apart = torch.where(
        cosine < 0,
        (product - cosine) / product,
        (base2 * change2 - dot**2).clamp(min=0) / (product * (product + cosine)),
    )
    # keeps NaN, so that a diverged module does not look unchanged
    apart = apart[product != 0]
    if magnitude is None:
        grown = ((2 * dot + change2) / (v + w)).masked_fill(v + w == 0, 0.0)
    elif magnitude.numel() == len(w):
        grown = magnitude.detach().cpu().double().flatten() - w
    else:
        raise ValueError(f"expected a magnitude of {len(w)} elements, one per output row, found {magnitude.numel()}")
    return Change(grown.abs().mean().item(), apart.mean().item() if len(apart) else 0.0)
