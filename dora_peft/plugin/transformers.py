"""Patches of transformers' own adapter methods, which every PreTrainedModel has from PeftAdapterMixin."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from peft.utils import save_and_load
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from ..adapters.checkpoint import from_checkpoint, keys_of
from ..adapters.undo import restored_on_failure
from ..config import DoraConfig
from ..layers import DoraLayer, layers_of
from .models import shape_error, unreadable
from .patching import Function, patch

_HUB_OPTIONS = ("token", "revision", "subfolder", "cache_dir")


def install() -> None:
    """Patch PeftAdapterMixin."""
    patch(PeftAdapterMixin, "load_adapter", _load_adapter)
    patch(PeftAdapterMixin, "add_adapter", _add_adapter)
    patch(PeftAdapterMixin, "set_adapter", _restoring)
    patch(PeftAdapterMixin, "delete_adapter", _restoring)


def _load_adapter(original: Function) -> Function:
    signature = inspect.signature(original)

    def load_adapter(self: PreTrainedModel, *args: object, **kwargs: object) -> object:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        name = bound.arguments["adapter_name"] or "default"
        with restored_on_failure(self, name, concerned=lambda: _is_dora(self, name)):
            try:
                info = original(self, *args, **kwargs)
                if _is_dora(self, name):
                    _check_loaded(self, name, bound.arguments)
                return info
            except RuntimeError as error:
                clearer = shape_error(error, bound.arguments["peft_model_id"]) if _is_dora(self, name) else None
                if clearer is None:
                    raise
                raise clearer from error
            except SafetensorError as error:
                raise unreadable(error, bound.arguments["peft_model_id"]) from error

    return load_adapter


def _is_dora(model: nn.Module, adapter_name: str) -> bool:
    return isinstance(getattr(model, "peft_config", {}).get(adapter_name), DoraConfig)


def _check_loaded(model: PreTrainedModel, adapter_name: str, arguments: dict[str, Any]) -> None:
    """What loading through PEFT checks and converts, after transformers has read the same file."""
    tensors = arguments["adapter_state_dict"]
    if tensors is None:
        options: dict[str, Any] = {**(arguments["adapter_kwargs"] or {}), **arguments["kwargs"]}
        hub = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
        tensors = save_and_load.load_peft_weights(arguments["peft_model_id"], device="cpu", **hub)
    config = cast(DoraConfig, model.peft_config[adapter_name])
    converted = from_checkpoint(model, adapter_name, tensors, config)
    with torch.no_grad():
        for name, layer in layers_of(model, adapter_name):
            parameters = (*layer.factor_parameters(adapter_name), layer.magnitude(adapter_name))
            for parameter, key in zip(parameters, keys_of(f"{name}.", converted), strict=True):
                value = converted.get(key)
                # These differ for grouped convolutions, and if plain PEFT needed an entry.
                if value is not None and value.shape == parameter.shape:
                    parameter.data.copy_(value)


def _add_adapter(original: Function) -> Function:
    def add_adapter(self: PreTrainedModel, adapter_config: object, *args: object, **kwargs: object) -> object:
        if not isinstance(adapter_config, DoraConfig):
            return original(self, adapter_config, *args, **kwargs)
        with restored_on_failure(self):
            return original(self, adapter_config, *args, **kwargs)

    return add_adapter


def _restoring(original: Function) -> Function:
    def method(self: PreTrainedModel, *args: object, **kwargs: object) -> object:
        if not any(isinstance(module, DoraLayer) for module in self.modules()):
            return original(self, *args, **kwargs)
        with restored_on_failure(self):
            return original(self, *args, **kwargs)

    return method
