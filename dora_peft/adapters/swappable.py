"""Whether an adapter may take another's place in a model, and what its folder holds beside A, B and m.

A fresh load makes the base anew: an initialisation takes a part out of W0, whole modules and rows of tokens are trained
in copies of the base's. A swap leaves the base as it is. So what a swap does not bring about is asked for beforehand,
and refused: the old adapter's head, tokens, biases or W0 under the new one's A, B and m would go wrong in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..bases.offload import at_hand
from ..config import DoraConfig
from ..layers import DoraLayer
from .convert import CHANGES_BASE

# Options that change the output, and that the tensors do not carry.
_SHARED = (
    "use_rslora",
    "lora_dropout",
    "dropout_mode",
    "magnitude_only_modules",
    "bias",
    "trainable_token_indices",
)
# What decides, beside the base, which part of W0 an initialisation takes out.
_OF_INITIALISATIONS = ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "loftq_config")
# These look at data as well: equal options do not make equal weights.
_OF_DATA = ("corda", "lora_ga")
_PREFIX = "base_model.model."


def check_options(old: DoraConfig, new: DoraConfig, adapter: str, source: str) -> None:
    """That nothing but tensors, ranks and alphas differs between two adapters.

    Args:
        old, new: Their configs.
        adapter, source: What the old and the new one are called in errors.

    Raises:
        ValueError: Another option is different, or one of their initialisations changed W0 in a way of its own.
    """
    for option in _SHARED:
        if getattr(old, option) != getattr(new, option):
            raise ValueError(
                f"Cannot hot-swap adapter '{adapter}' with {source}: {option} is {getattr(old, option)!r} and "
                f"{getattr(new, option)!r}. Load it under another name."
            )
    changing = [init for init in map(initialisation_of_base, (old, new)) if init is not None]
    different = [o for o in _OF_INITIALISATIONS if getattr(old, o) != getattr(new, o)]
    if changing and (different or changing[0].startswith(_OF_DATA)):
        reason = f" (they differ in {different[0]})" if different else ""
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter}' with {source}: init_lora_weights={changing[0]!r} changed the base's "
            f"weights for one of them{reason}, and a swap leaves "
            "these as they are. Save such an adapter with path_initial_model_for_weight_conversion, or load it into a "
            "fresh base model."
        )


def initialisation_of_base(config: DoraConfig) -> str | None:
    """The initialisation that changed the base's weights, None if none did."""
    init = config.init_lora_weights
    return init if isinstance(init, str) and init.startswith(CHANGES_BASE) else None


def trained_beside(model: nn.Module, adapter: str, config: DoraConfig) -> dict[str, Tensor]:
    """What an adapter trains beside A, B and m, by its keys in a file: modules_to_save, rows of tokens, biases.

    Args:
        model: The model whose modules are adapted, a PeftModel or what it adapts.
    """
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers()))
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key, own in module.adapter_state_dict_load_map(adapter).items():
                names[f"{name}.{key}"] = f"{name}.{own}"
    if config.bias != "none":
        ending = ".bias" if config.bias == "all" else ".base_layer.bias"
        names.update({name: name for name in tensors if name.endswith(ending) and "lora_" not in name})
    return {f"{_PREFIX}{key.removeprefix(_PREFIX)}": tensors[own] for key, own in names.items() if own in tensors}


def without_base(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str, source: str) -> dict[str, Tensor]:
    """A folder's tensors without those of the base model itself, which PEFT saves of adapted or resized embeddings.

    Args:
        model: The model whose modules are adapted.
        tensors: As read from the file.
        adapter, source: What the old and the new adapter are called in errors.

    Raises:
        ValueError: One of them is another tensor than the model has.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    for key, tensor in tensors.items():
        name = key if key in parameters else key.removeprefix(_PREFIX)
        if name not in parameters or "lora_" in name:
            out[key] = tensor
        elif not _equals(model, name, tensor):
            raise ValueError(
                f"Cannot hot-swap adapter '{adapter}' with {source}: it holds the base model's '{name}', and not as "
                "this model has it. Load it into a base model without an adapter."
            )
    return out


def _equals(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether loading a tensor as a parameter of the base would leave that as it is."""
    owner_name, _, own_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    adapted = model.get_submodule(owner_name.rpartition(".")[0]) if owner_name.endswith("base_layer") else None
    with at_hand(owner):
        # without what is merged into it
        weight = adapted.original_weight() if isinstance(adapted, DoraLayer) and own_name == "weight" else None
        own = weight if isinstance(weight, Tensor) else owner.get_parameter(own_name)
        fits = own.shape == tensor.shape and not own.is_meta
        return fits and torch.equal(own, tensor.to(own.device, own.dtype))
