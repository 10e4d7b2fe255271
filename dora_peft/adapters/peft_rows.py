"""Entries that plain PEFT needs in rows whose norm is 0, and taking them out again.

PEFT's `use_dora` divides by ||W0 + s B A||. A tied row that has not been trained yet has nothing there, so the saved B
gets one entry in it: large enough for the norm to survive in the dtype that PEFT computes it in, small enough for the
row's output to stay near 0. In fp32 and bf16, whose exponents reach to 1e-38, that is a norm of 1e-12; fp16 ends at
6e-8, and the products B A come before the factor s, so there the largest product is 2^-17 and the norm about 1e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import DoraLayer

TINY = 1e-12
# The largest |B A| of a filled row and the least norm left alone, if PEFT computes in fp16.
HALF_PRODUCT, HALF_NORM = 2.0**-17, 2.0**-14


def in_half(layer: DoraLayer, *tensors: Tensor) -> bool:
    """Whether PEFT may compute the norm in fp16: one of the saved tensors or the base is."""
    dtypes = [t.dtype for t in (*tensors, layer.original_weight()) if isinstance(t, Tensor)]
    return torch.float16 in dtypes


def limit(half: bool) -> float:
    """The norm up to which a row counts as empty."""
    return HALF_NORM if half else TINY


@torch.no_grad()
def fill(
    layer: DoraLayer, adapter: str, lora_A: Tensor, lora_B: Tensor, rows: Tensor, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A and B with an entry in each of these rows, unless it has one that is large enough already.

    Args:
        layer: The adapted layer.
        adapter: The adapter.
        lora_A, lora_B: As the layer stores them; not changed.
        rows: bool [out], the empty rows.
        half: See `in_half`.

    Returns:
        A, B, and the rows [out] whose B was 0 before. A differs only if all of it was 0.
    """
    lora_A, lora_B = _copy(lora_A), _copy(lora_B)
    rows = rows.to(lora_B.device)
    filled = rows & ~lora_B.flatten(1).any(1)
    matrix = lora_A.flatten(1)
    row = int(matrix.abs().amax(1).argmax())
    if not matrix[row].any():
        matrix[row, 0] = _first(half)
    _raise(lora_B, rows, row, entry(layer.initial_scaling(adapter), matrix[row], half))
    return lora_A, lora_B, filled


@torch.no_grad()
def fill_grouped(
    layer: DoraLayer, adapter: str, lora_A: Tensor, lora_B: Tensor, rows: Tensor, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fill` for a grouped convolution, whose norm in PEFT is not that of the composed kernel.

    B [out, r / groups] read as [out / groups, r] times A [r, in], read as [out, in / groups]: what PEFT adds to row o
    of the kernel is part o % groups of the columns of row o // groups of the product, in which B[o, j] multiplies
    row (o % groups) * r / groups + j of A.
    """
    lora_A, lora_B = _copy(lora_A), _copy(lora_B)
    rows = rows.to(lora_B.device)
    filled = rows & ~lora_B.flatten(1).any(1)
    groups, per_group = getattr(layer.get_base_layer(), "groups", 1), lora_B.shape[1]
    parts = lora_A.flatten(1).view(groups, per_group, groups, -1)
    for o in rows.nonzero()[:, 0].tolist():
        # [r / groups, in / groups]
        part = parts[o % groups, :, o % groups]
        j = int(part.abs().amax(1).argmax())
        if not part[j].any():
            part[j, 0] = _first(half)
        only = torch.zeros_like(rows)
        only[o] = True
        _raise(lora_B, only, j, entry(layer.initial_scaling(adapter), part[j], half))
    return lora_A, lora_B, filled


@torch.no_grad()
def take_out(lora_A: Tensor, lora_B: Tensor, filled: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and B without what `fill` put into them.

    Args:
        lora_A, lora_B: As in the file; not changed.
        filled: The rows [out] that `fill` returned.
    """
    if filled is not None:
        lora_B = _copy(lora_B)
        lora_B[filled.to(lora_B.device)] = 0
    entries = lora_A[lora_A != 0]
    if entries.numel() == 1 and any(entries.item() == _first(half, lora_A.dtype) for half in (True, False)):
        lora_A = torch.zeros_like(lora_A)
    return lora_A, lora_B


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _first(half: bool, dtype: torch.dtype = torch.float64) -> float:
    """The only entry of an A that was all zero, as stored in `dtype`."""
    return torch.tensor(HALF_NORM if half else TINY, dtype=dtype).item()


def entry(scaling: float, row: Tensor, half: bool) -> float:
    """What B has to hold to multiply this row of A by, where s is `scaling`."""
    scaling = abs(scaling) or 1.0
    if half:
        return min(HALF_PRODUCT / (min(scaling, 1.0) * row.abs().max().item()), 2.0**15)
    return TINY / (scaling * torch.linalg.vector_norm(row.double()).item())


def _raise(lora_B: Tensor, rows: Tensor, column: int, least: float) -> None:
    entries = lora_B[rows, column]
    lora_B[rows, column] = torch.where(entries.abs() < least, torch.full_like(entries, least), entries)
