"""What an adapter's files hold, in numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from .convert import Report, read_checked
from .formats import Base, format_of, read_source


@dataclass(frozen=True)
class ModuleInfo:
    """One module.

    Attributes:
        shape: [out, in] of its weight, kernels flattened.
        rank, alpha: s = alpha / rank; that of rsLoRA is written like this too.
        dtypes: Of A, B and m.
        change: mean_j |m_j / ||W0_j|| - 1|; None without magnitudes or base.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    dtypes: tuple[str, ...]
    change: float | None = None


@dataclass(frozen=True)
class Info:
    """An adapter.

    Attributes:
        format: The name of its format.
        path: Its file of tensors.
        base: The base model's name, as the files have it.
        modules: What is adapted.
        others: The keys of other trained tensors.
        nbytes: Of all tensors.
        notes: What a reader should know, a sentence each.
    """

    format: str
    path: str
    base: str | None
    modules: list[ModuleInfo]
    others: list[str]
    nbytes: int
    notes: list[str]


def info(
    adapter: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    source_format: str | None = None,
    device: torch.device | str = "cpu",
    axis: str | None = None,
    allow_pickle: bool = False,
    progress: Report | None = None,
) -> Info:
    """Read an adapter and say what it holds; arguments and errors are those of `convert`."""
    source = read_source(adapter, allow_pickle=allow_pickle)
    weights = None if base is None else Base(base, device, progress)
    name = source_format or format_of(source)
    read = read_checked(source, name, weights, axis, describe=True)
    modules = []
    for path, module in read.modules.items():
        change, tensors = None, [module.lora_A, module.lora_B]
        if module.magnitude is not None:
            tensors.append(module.magnitude)
            if weights is not None:
                norms = weights.row_norms(path, module, with_change=False)
                # a row of zeros has no change to measure
                moved = (module.magnitude.double().cpu() / norms - 1)[norms > 0].abs()
                change = moved.mean().item() if len(moved) else None
        dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        shape = (module.out_features, module.in_features)
        modules.append(ModuleInfo(path, shape, module.rank, module.alpha, dtypes, change))
    nbytes = sum(tensor.nbytes for tensor in source.tensors.values())
    return Info(name, str(source.path), read.base, modules, list(read.others), nbytes, read.notes)
