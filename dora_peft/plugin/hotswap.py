"""Patches of peft.utils.hotswap, whose functions know PEFT's LoRA layers alone (PEFT 0.20.0 to 0.21.2).

Patched is what its two public functions look up while they run, so that they work however they were imported:

    CONFIG_KEYS_TO_CHECK                a registry by kind of adapter, without an entry for ours
    load_peft_weights                   by this name too, see models.py
    hotswap_adapter_from_state_dict     writes zeros where a tensor is missing, which for m is no adapter at all; knows
                                        neither tied rows nor the norms of grouped convolutions
    _convert_scalings_to_tensor,        look for PEFT's layers; the latter leaves the layers' own rank and the config's
    _pad_lora_weights                   lora_alpha as they were, so that a saved adapter has another scaling

and `hotswap_adapter` itself, so that a `use_dora` folder of PEFT's is taken as DoRA by a DoRA model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import peft.utils.hotswap
from peft import PeftConfig
from torch import Tensor, nn

from ..adapters import hotswap
from ..config import DoraConfig
from ..layers import DoraLayer
from .configs import into_dora
from .patching import Function, patch
from .peft_type import add_peft_type


def install() -> None:
    """Patch peft.utils.hotswap."""
    module = peft.utils.hotswap
    module.CONFIG_KEYS_TO_CHECK[add_peft_type()] = ["use_rslora", "lora_dropout"]
    patch(module, "hotswap_adapter", _hotswap)
    patch(module, "hotswap_adapter_from_state_dict", _from_state_dict)
    patch(module, "_convert_scalings_to_tensor", _convert_scalings)
    patch(module, "_pad_lora_weights", _pad)


def _uncompiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def _is_dora(model: nn.Module) -> bool:
    return any(isinstance(module, DoraLayer) for module in model.modules())


def _configs(model: nn.Module) -> dict[str, DoraConfig]:
    return cast("dict[str, DoraConfig]", getattr(_uncompiled(model), "peft_config", {}))


def _hotswap(original: Function) -> Function:
    def hotswap_adapter(model: nn.Module, *args: object, **kwargs: object) -> object:
        token = into_dora.set(into_dora.get() or _is_dora(model))
        try:
            return original(model, *args, **kwargs)
        finally:
            into_dora.reset(token)

    return hotswap_adapter


def _from_state_dict(original: Function) -> Function:
    def hotswap_adapter_from_state_dict(
        model: nn.Module,
        state_dict: Mapping[str, Tensor],
        adapter_name: str,
        config: PeftConfig,
        *args: object,
        **kwargs: object,
    ) -> object:
        if not _is_dora(model):
            return original(model, state_dict, adapter_name, config, *args, **kwargs)
        if not isinstance(config, DoraConfig):
            raise ValueError(
                f"Expected the DoraConfig of the adapter that is swapped in, found a {type(config).__name__}. Read it "
                "with dora_peft.DoraConfig.from_pretrained."
            )
        after = re.compile(rf"(\.lora_[A-Za-z_]+)\.{re.escape(adapter_name)}(?=\.|$)")
        tensors = {after.sub(r"\1", key): tensor for key, tensor in state_dict.items()}
        source = "the new adapter"
        hotswap.swap_tensors(_uncompiled(model), _configs(model), tensors, config, adapter_name, source)
        return None

    return hotswap_adapter_from_state_dict


def _convert_scalings(original: Function) -> Function:
    def _convert_scalings_to_tensor(model: nn.Module) -> bool:
        ours = hotswap.prepare_scalings(model)
        return bool(original(model)) or ours

    return _convert_scalings_to_tensor


def _pad(original: Function) -> Function:
    def _pad_lora_weights(model: nn.Module, target_rank: int) -> bool:
        ours = hotswap.prepare_ranks(_uncompiled(model), _configs(model), target_rank)
        return bool(original(model, target_rank=target_rank)) or ours

    return _pad_lora_weights
