"""How an adapter's tensors and modules are named: in a model, in a checkpoint, and in the patterns of a config."""

from __future__ import annotations

import re

from torch import Tensor, nn


def exactly(name: str) -> str:
    """A rank_pattern or alpha_pattern key for one module alone; a bare name would match the ends of others too."""
    return f"^{re.escape(name)}"


def belongs_to(parameter_name: str, adapter: str) -> bool:
    """Whether a parameter is A, B or m of this adapter."""
    rest = parameter_name.rpartition(".lora_")[2]
    return rest != parameter_name and (f".{adapter}." in rest or rest.endswith(f".{adapter}"))


def to_parameter_names(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names that the model's parameters have."""
    names = {}
    for name, _ in model.named_parameters():
        key = name.removesuffix(f".{adapter}").replace(f".{adapter}.weight", ".weight")
        names[key] = names[f"base_model.model.{key}"] = name
    return {names.get(key, key): value for key, value in tensors.items()}
