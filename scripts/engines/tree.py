"""A base of linear layers alone, without this package: it runs in the environments of other tools."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def model(folder: Path) -> nn.Module:
    """A tree of linear layers by the base's names."""
    root = nn.Module()
    for key, weight in load_file(folder / "base" / "model.safetensors").items():
        *parents, name, _ = key.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        holder.add_module(name, layer)
    return root


def outputs(root: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {path: root.get_submodule(path)(x).contiguous() for path, x in inputs.items()}
