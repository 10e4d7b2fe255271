"""PEFT 0.20: it has no methods of a tuner for the state dict, so its two functions are patched instead."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters.checkpoint import from_checkpoint, to_checkpoint
from ..config import DoraConfig
from .patching import Function, patch_everywhere


def install() -> None:
    """Patch both functions in every module of PEFT that has imported them."""
    patch_everywhere("get_peft_model_state_dict", _get_state_dict)
    patch_everywhere("set_peft_model_state_dict", _set_state_dict)


def _get_state_dict(original: Function) -> Function:
    def get_peft_model_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor] | None = None,
        adapter_name: str = "default",
        *args: object,
        **kwargs: object,
    ) -> object:
        out = original(model, state_dict, adapter_name, *args, **kwargs)
        config = _config(model, adapter_name)
        if config is None or not isinstance(out, dict):
            return out
        # The function's branch for tuners that it does not know leaves the biases out.
        if config.bias != "none":
            suffix = ".bias" if config.bias == "all" else ".base_layer.bias"
            tensors = model.state_dict() if state_dict is None else state_dict
            out.update({k: v for k, v in tensors.items() if k.endswith(suffix)})
        return to_checkpoint(model, adapter_name, out, config, infix="")

    return get_peft_model_state_dict


def _set_state_dict(original: Function) -> Function:
    def set_peft_model_state_dict(
        model: nn.Module,
        peft_model_state_dict: dict[str, Tensor],
        adapter_name: str = "default",
        *args: object,
        **kwargs: object,
    ) -> object:
        config = _config(model, adapter_name)
        if config is not None:
            peft_model_state_dict = from_checkpoint(model, adapter_name, peft_model_state_dict, config)
        return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _config(model: nn.Module, adapter_name: str) -> DoraConfig | None:
    """The adapter's config if it is DoRA."""
    configs = getattr(model, "peft_config", {})
    return configs[adapter_name] if isinstance(configs[adapter_name], DoraConfig) else None
