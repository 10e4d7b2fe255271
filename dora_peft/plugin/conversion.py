"""Patches of PEFT's convert_to_lora and save_as_lora, which decompose W' - W0 (PEFT 0.20.0 to 0.21.2).

    convert_to_lora           its config leaves out modules that are no `target_modules` (magnitude_only_modules under a
                              share as rank or a regular expression) and layer_replication, so that what it wrote loads
                              to other outputs. And a share, rank=0.9, gives each module a rank, as rank_pattern and
                              alpha_pattern, which llama.cpp does not read and SGLang leaves aside: said in a warning
    _convert_module_to_lora   asks layers for an adapter that they do not have

`save_as_lora` calls the former. That neither knows embeddings and convolutions is said by the layers themselves.
"""

from __future__ import annotations

import re
import warnings
from typing import cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..config import DoraConfig
from ..layers import DoraLayer, layers_of
from .patching import Function, patch_everywhere

_PREFIX = "base_model.model."


def install() -> None:
    """Patch both functions."""
    patch_everywhere("convert_to_lora", _convert)
    patch_everywhere("_convert_module_to_lora", _convert_module)


def _convert(original: Function) -> Function:
    def convert_to_lora(
        model: nn.Module, rank: float, adapter_name: str = "default", *args: object, **kwargs: object
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        config, tensors = original(model, rank, adapter_name, *args, **kwargs)
        old = getattr(model, "peft_config", {}).get(adapter_name)
        if isinstance(old, DoraConfig):
            _complete(config, old, model, adapter_name)
            _warn_about_patterns(config)
        return config, tensors

    return convert_to_lora


def _convert_module(original: Function) -> Function:
    def _convert_module_to_lora(
        module: nn.Module, rank: float, adapter_name: str = "default"
    ) -> tuple[Tensor, Tensor, int]:
        if isinstance(module, DoraLayer) and adapter_name not in module.r:
            # rank 0, which PEFT leaves out
            return torch.empty(0), torch.empty(0), 0
        return original(module, rank, adapter_name)

    return _convert_module_to_lora


def _complete(config: LoraConfig, old: DoraConfig, model: nn.Module, adapter: str) -> None:
    """Have the new config name all modules that were converted."""
    config.layer_replication = old.layer_replication
    names = [name.removeprefix(_PREFIX) for name, layer in layers_of(model, adapter) if layer.magnitude_only[adapter]]
    if isinstance(config.target_modules, str):
        config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, names)])
    else:
        # a set, as PEFT makes of its list
        config.target_modules = cast("list[str]", {*(config.target_modules or ()), *names})


def _warn_about_patterns(config: LoraConfig) -> None:
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if len(set(ranks)) == 1:
        return
    largest = max(ranks)
    warnings.warn(
        f"This LoRA has ranks from {min(ranks[1:])} to {largest}, given by rank_pattern and alpha_pattern beside "
        f"r={config.r}. PEFT and vLLM read these. llama.cpp knows no patterns and scales by lora_alpha / rank of the "
        f"tensor, {config.lora_alpha}/{largest} instead of 1 for the largest; SGLang takes r and lora_alpha for all "
        "modules. For one rank that every server reads alike pass an integer as rank, or use "
        "`dora-peft export ADAPTER --base MODEL --out DIR --as lora`.",
        stacklevel=3,
    )
