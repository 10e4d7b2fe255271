"""Hot-swapping: other tensors and scalings in the place of an adapter's, with the same parameters and modules."""

from __future__ import annotations

import torch
from peft.utils import save_and_load
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..config import DoraConfig
from ..layers import DoraLayer
from .checkpoint import from_checkpoint
from .names import belongs_to, to_parameter_names
from .undo import restored_on_failure

# Options that change the output, and that the tensors do not carry.
_SHARED = ("use_rslora", "lora_dropout", "dropout_mode", "magnitude_only_modules")


def swap(
    model: nn.Module, configs: dict[str, DoraConfig], path: str, adapter_name: str, torch_device: str | None
) -> None:
    """Replace an adapter's tensors and scalings by those of a checkpoint, in place.

    Args:
        model: The model whose modules are adapted.
        configs: Its adapters' configs by name; that of `adapter_name` is replaced.
        path: The checkpoint's folder or Hub repository.
        adapter_name: The adapter.
        torch_device: Where to read the checkpoint to.

    Raises:
        ValueError: The adapter is merged, or the checkpoint does not fit it. The old adapter is then untouched.
    """
    config = DoraConfig.from_pretrained(path)
    old = configs[adapter_name]
    for option in _SHARED:
        if getattr(old, option) != getattr(config, option):
            raise ValueError(
                f"Cannot hot-swap adapter '{adapter_name}' with '{path}': {option} is {getattr(old, option)!r} and "
                f"{getattr(config, option)!r}. Load it under another name."
            )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DoraLayer) and adapter_name in m.r}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Cannot hot-swap adapter '{adapter_name}' while it is merged. Call unmerge_adapter() first.")
    with restored_on_failure(model, adapter_name):
        # The conversion of grouped convolutions from the checkpoint depends on the new scaling.
        for name, layer in layers.items():
            pattern = get_pattern_key(list(config.alpha_pattern), name)
            layer.lora_alpha[adapter_name] = config.alpha_pattern.get(pattern, config.lora_alpha)
            layer.set_scale(adapter_name, 1.0)
            layer.detach_norm[adapter_name] = config.detach_norm
        # Looked up in its module at each call, so that the patch of plugin/models.py is taken.
        tensors = save_and_load.load_peft_weights(path, device=torch_device)
        tensors = from_checkpoint(model, adapter_name, tensors, config)
        _copy(model, adapter_name, to_parameter_names(model, adapter_name, tensors), path)
        config.inference_mode = old.inference_mode
        configs[adapter_name] = config


def _copy(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], path: str) -> None:
    current = {n: p for n, p in model.named_parameters() if belongs_to(n, adapter_name)}
    different = sorted(set(current) ^ set(tensors)) or sorted(
        name for name in current if current[name].shape != tensors[name].shape
    )
    if different:
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' with '{path}': expected the same tensors of the same shapes, "
            f"found a difference in {', '.join(different[:3])}{' ...' * (len(different) > 3)}. Load it under another "
            "name."
        )
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(tensors[name])
