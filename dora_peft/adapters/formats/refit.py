"""A DoRA per output row that comes near one per input column."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ... import reference
from ...bases import BaseWeight
from .adapter import Module


def refitted(weight: BaseWeight, module: Module, scale: Tensor) -> tuple[Module, float]:
    """Fit W'' = m (W0 + s B A) / ||W0 + s B A||, norm per output row, to W' = (W0 + s B A) d per input column.

    Where d = scale / ||W0 + s B A|| per column. Rows of W' are first brought to the length that W0 would have in them,
    c = <W', W0> / ||W0||^2; what W' / c is more than W0 becomes the new B A by its largest singular values.

    Args:
        weight: W0.
        module: A, B and s of the file.
        scale: dora_scale [in].

    Returns:
        The module with m [out], in the dtypes of A and B, and ||W'' - W'|| / ||W' - W0||.
    """
    lora_A, lora_B = (factor.double() for factor in module.matrices())
    base = weight.dense().double().cpu()
    composed = torch.addmm(base, lora_B, lora_A, alpha=module.scaling)
    columns = composed.view(len(base), -1, composed.shape[1] // scale.numel())
    norms = torch.linalg.vector_norm(columns, dim=(0, 2))
    target = (columns * (scale.double() / norms)[:, None]).reshape(base.shape)
    squared = base.square().sum(1)
    # a row of zeros has no length to bring anything to
    c = torch.where(squared > 0, (target * base).sum(1) / squared, torch.ones_like(squared))
    c = torch.where(c.abs() > 0, c, torch.ones_like(c))
    change = target / c[:, None] - base
    u, sigma, v = torch.linalg.svd(change, full_matrices=False)
    rank = min(module.rank, len(sigma))
    root = sigma[:rank].sqrt()
    new_A, new_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    new_A[:rank], new_B[:, :rank] = root[:, None] * v[:rank], u[:, :rank] * root / module.scaling
    new_A, new_B = new_A.to(module.lora_A.dtype), new_B.to(module.lora_B.dtype)
    length = reference.weight_norm(base, new_A.double(), new_B.double(), module.scaling)
    magnitude = (c * length).to(module.lora_A.dtype)
    made = reference.dora_weight(
        base, new_A.double(), new_B.double(), magnitude.double(), module.scaling, tied=length == 0
    )
    error = (made - target).norm() / (target - base).norm().clamp(min=1e-300)
    out = replace(module, lora_A=new_A.view_as(module.lora_A), lora_B=new_B.view_as(module.lora_B), magnitude=magnitude)
    return out, error.item()
