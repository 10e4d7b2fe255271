"""A refresh amid a training pass over a dense base weight, which shares work with it, see `Sharing`.

On short batches what `refreshed` makes ready for every kind of weight takes longer than the arithmetic. The usual case
goes straight: factors and W0 in one dtype that norms are computed in, no row tied, nothing kept elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.content import Bits
from ..ops.norm import Sharing
from .adapted import AdaptedLayer
from .records import Norm, Snapshot, Stored
from .state import base_norm, refreshed


def refreshed_amid(
    layer: AdaptedLayer,
    adapter: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stored: Stored,
    by_kernels: bool,
    sharing: Sharing | None,
) -> tuple[Snapshot, Tensor | None, Tensor | None]:
    """`refreshed`, for the layer's own dense weight if there is `sharing`."""
    norm = layer._norms[adapter]
    if sharing is None or norm.tied is not None or by_kernels or not _is_usual(sharing.matrix, lora_A, lora_B):
        return refreshed(layer, adapter, lora_A, lora_B, scaling, stored, by_kernels, sharing=sharing)
    return _refresh(layer, norm, lora_A, lora_B, scaling, sharing)


def _refresh(
    layer: AdaptedLayer, norm: Norm, lora_A: Tensor, lora_B: Tensor, scaling: float, sharing: Sharing
) -> tuple[Snapshot, Tensor | None, Tensor | None]:
    """`refreshed_amid` in the usual case."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        # first, as in `refreshed`
        copies = Bits(lora_A), Bits(lora_B)
        base = base_norm(layer)
        value, composed, product = sharing.norm(layer.base_weight, base.squared, lora_A, lora_B, scaling)
        value = torch.maximum(value, base.floor)
    finally:
        torch.set_grad_enabled(before)
    known = norm.renew(Snapshot(value, None, *copies, scaling, base, False))
    return known, composed, product


def _is_usual(matrix: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    dtype = matrix.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    if (
        lora_A.dtype is not dtype
        or lora_B.dtype is not dtype
        or not (matrix.is_cpu and lora_A.is_cpu and lora_B.is_cpu)
    ):
        return False
    return not (torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"))
