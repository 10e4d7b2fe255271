"""W' taken apart into rows c W0 and a plain LoRA c s B A, and what rounding both costs.

Of several adapters, W' = c2 (c1 (W0 + s1 B1 A1) + s2 B2 A2): the rows are c2 c1 W0, and the LoRA is [A1; A2] with
[c2 c1 s1 B1, c2 s2 B2].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...layers import DoraLayer
from ...ops import merging
from .adapted import Parts
from .fingerprint import add


@dataclass(frozen=True)
class Split:
    """W' = diag(scale) W0 + lora_B lora_A.

    Attributes:
        scale: c of all adapters together, [out].
        lora_A: [r, in], in the accumulation dtype; the ranks of several adapters one after the other.
        lora_B: [out, r], with c and s.
    """

    scale: Tensor
    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class Loss:
    """What rounding cost one module.

    Attributes:
        error: ||W_served - W'||_F, W_served being what a server computes with.
        update: ||W' - W0||_F.
        rows, lost: How many rows have c other than 1, and how many of those came out as W0's own.
        digest: Of the new base's rows, see `fingerprint.digest_of`; empty without a LoRA over it.
    """

    error: float
    update: float
    rows: int
    lost: int
    digest: str

    @property
    def error_over_update(self) -> float:
        return self.error / self.update if self.update else 0.0

    @property
    def share_lost(self) -> float:
        return self.lost / self.rows if self.rows else 0.0


def split(parts: Parts) -> Split:
    """The factors c of W0's rows and the low-rank rest of W'.

    Args:
        parts: A [r, in], B [out, r], s and c [out] of each adapter in order; see `AdaptedBase.parts`.
    """
    return Split(*merging.rows_and_factors(parts))


def scaled(layer: DoraLayer, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """c W0 in the base layer's own layout, in `dtype`.

    Args:
        layer: The layer with its W0 at hand.
        scale: c [out].
        dtype: Of the new weight.
    """
    weight, base = layer.base_weight(), layer.get_base_layer()
    new = torch.empty_like(base.get_parameter("weight"), dtype=dtype)
    matrix = layer.kind.matrix(base, new)
    for start, stop, rows in weight.blocks():
        matrix[start:stop] = rows * scale[start:stop, None]
    return new


def loss_of(layer: DoraLayer, parts: Parts, served: Tensor, lora: tuple[Tensor, Tensor] | None = None) -> Loss:
    """Compare what a server computes with to W'.

    Args:
        layer: The layer with its W0 at hand.
        parts: What W' is made of.
        served: The new base's weight in its layout.
        lora: A [r, in] and B [out, r] of the plain LoRA over it as they are stored, s = 1; None if there is none.
    """
    weight = layer.base_weight()
    matrix = layer.kind.matrix(layer.get_base_layer(), served)
    factors = None if lora is None else [factor.to(weight.device, weight.dtype) for factor in lora]
    scale = split(parts).scale
    changed = (scale - 1).abs() > torch.finfo(scale.dtype).eps
    error = update = 0.0
    lost = 0
    hashed = hashlib.sha256()
    for start, stop, rows in weight.blocks():
        new = matrix[start:stop]
        if factors is not None:
            add(hashed, new)
        same = (new == rows.to(new.dtype)).all(1) & rows.any(1)
        lost += int((same & changed[start:stop]).sum())
        target = merging.merged_rows(rows.clone(), start, stop, parts)
        update += (target - rows).double().square().sum().item()
        there = new.to(weight.device, weight.dtype)
        target.sub_(there if factors is None else torch.addmm(there, factors[1][start:stop], factors[0]))
        error += target.double().square().sum().item()
    return Loss(error**0.5, update**0.5, int(changed.sum()), lost, "" if lora is None else hashed.hexdigest())
