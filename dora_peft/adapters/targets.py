"""Which modules of a model an adapter goes on, and what is said of those that it cannot go on."""

from __future__ import annotations

import copy
import re
import warnings
from typing import TypedDict, cast

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from ..bases import peft_names
from ..config import DoraConfig
from ..layers import DoraLayer, layer_class

# Modules whose weight these architectures use without calling the module, so that an adapter would never run
# (peft.tuners.tuners_utils._check_lora_target_modules_mamba, which looks at PEFT's own types only).
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_MODULES = {"out_proj", "conv1d"}


class LayerOptions(TypedDict):
    """What differs between the layers of one adapter, and their common config."""

    r: int
    lora_alpha: float
    config: DoraConfig
    magnitude_only: bool


def is_magnitude_only(config: DoraConfig, key: str) -> bool:
    """Whether the module of this name trains m alone."""
    if not config.magnitude_only_modules:
        return False
    as_targets = copy.copy(config)
    as_targets.target_modules = config.magnitude_only_modules
    return bool(check_target_module_exists(as_targets, key))


def all_linear(model: nn.Module, config: DoraConfig) -> set[str] | str:
    """The names of all linear layers that an adapter can go on, but the output layer; as a regular expression where a
    name alone would match one that is left out by its end.

    What the model does not call is left out with a warning: the output layer of nn.MultiheadAttention, and those of
    Mamba models.
    """
    names = peft_names.all_linear(model, config)
    inside = {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_children()
    }
    left_out = {name for name in names if name in inside or _is_read(model, name.rpartition(".")[2])}
    if left_out:
        warnings.warn(
            f"'all-linear' leaves out {', '.join(sorted(left_out)[:3])}{' ...' * (len(left_out) > 3)}: the model uses "
            "their weights without calling them (nn.MultiheadAttention, Mamba), so an adapter would never run.",
            stacklevel=2,
        )
    kept = names - left_out
    if any(other.endswith(f".{name}") for name in kept for other in left_out):
        return "|".join(re.escape(name) for name in sorted(kept))
    return kept


def _is_read(model: nn.Module, target_name: str) -> bool:
    """Whether modules of this name are read and not called, in a Mamba-based model."""
    return getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES and target_name in _MAMBA_MODULES


def check_called(model: nn.Module, target_name: str) -> None:
    """Refuse a module whose weight the model uses without calling the module.

    Raises:
        ValueError: It is one of a Mamba-based model.
    """
    if _is_read(model, target_name):
        model_type = cast(PreTrainedModel, model).config.model_type
        raise ValueError(
            f"Module '{target_name}' is incompatible with Mamba-based models (model_type='{model_type}'), which "
            "use its weight without calling it. Remove it from target_modules, or add it to exclude_modules."
        )


def wrapped(target: nn.Module, adapter_name: str, parent: nn.Module, key: str, options: LayerOptions) -> nn.Module:
    """A DoRA layer around a module.

    Args:
        target: The base layer.
        adapter_name: The adapter that it gets.
        parent: The module that holds it.
        key: Its name in the model.
        options: What the layer is created with.

    Raises:
        ValueError: The module cannot be adapted.
    """
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"DoRA cannot adapt module '{key}': nn.MultiheadAttention uses its weight without calling it, so the "
            "adapter would never run. Leave it out with exclude_modules."
        )
    cls = layer_class(target)
    if cls is None:
        raise ValueError(
            f"Target module {target} (module '{key}') is not supported. Currently, only the following modules are "
            "supported: `torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
            "`torch.nn.Conv3d`, `transformers.pytorch_utils.Conv1D` and quantised linear layers. Change "
            "target_modules or leave the module out with exclude_modules."
        )
    return cast(nn.Module, cls(target, adapter_name, name=key, **options))


def keep_called(model: nn.Module) -> None:
    """Have torch's own transformer layers call the layers inside them.

    In evaluation without gradients they have a way of their own, which reads the weights of linear1 and linear2: there
    an adapter would do nothing, in silence (torch 2.13; PEFT's LoRA does nothing there).
    """
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if any(isinstance(inner, DoraLayer) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                # nested tensors go that way alone
                module.use_nested_tensor = False
            else:
                # for torch "an activation that the way does not know"; nothing else reads it
                module.activation_relu_or_gelu = 0


def check_found(model: nn.Module, adapter_name: str, config: DoraConfig) -> None:
    """Refuse an adapter that was created on no module.

    Raises:
        ValueError: None of the modules that the config names is there.
    """
    if config.magnitude_only_modules and not config.magnitude_only_ranks:
        missing = f"Magnitude-only modules {config.magnitude_only_modules}"
    elif config.target_modules != DUMMY_TARGET_MODULES and not any(
        isinstance(m, DoraLayer) and adapter_name in m.lora_magnitude_vector for m in model.modules()
    ):
        # PEFT 0.20 overlooks this in a second adapter.
        missing = f"Target modules {config.target_modules}"
    else:
        return
    # In the words of PEFT, which finds out most of these itself.
    raise ValueError(f"{missing} not found in the base model.")


def with_names(error: ValueError, model: nn.Module) -> ValueError | None:
    """An error about modules that are not there, with the names of those that can be adapted; None for another error.

    Args:
        error: An error that ended the creation of an adapter.
        model: The model, without the adapter.
    """
    if "not found in the base model" not in str(error):
        return None
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if layer_class(m) is not None})
    return type(error)(
        f"{error} Modules of {type(model).__name__} that can be adapted are named {', '.join(names[:20])}; "
        "target_modules='all-linear' takes every linear layer but the output layer."
    )
