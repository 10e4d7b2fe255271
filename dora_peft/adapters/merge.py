"""Merging a model's adapters into its base weights: what is checked before anything is written, then layer by layer."""

from __future__ import annotations

import warnings

from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn
from tqdm import tqdm

from ..layers import DoraLayer, called, merge_checks
from .undo import remember


def check_merge(model: nn.Module, adapter_names: list[str] | None, for_good: bool) -> None:
    """Check that every weight which merging these adapters writes to can be written, and say which it unties.

    Args:
        model: The model whose modules are adapted.
        adapter_names: The active ones if None.
        for_good: Whether the adapters will be unloaded, so that nothing can be unmerged.

    Raises:
        NotImplementedError: A weight cannot be written. Nothing has been touched.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, DoraLayer)]
    merge_checks.note_other_names(model, layers)
    concerned = [layer for _, layer in layers if layer.adapters_to_merge(adapter_names)]
    for layer in concerned:
        layer.check_mergeable(brought_in=False)
    watched = [layer.name for layer in concerned if _is_watched(layer, layer.adapters_to_merge(adapter_names))]
    if watched:
        warnings.warn(
            "Hooks on lora_A, lora_B, dropout or magnitude do not run while an adapter is merged, and what they change "
            f"is not in the merged weight: {', '.join(watched[:3])}{' ...' * (len(watched) > 3)}.",
            stacklevel=3,
        )
    owners = merge_checks.owners_of_weights(model)
    for layer in concerned:
        shared = owners.get(id(layer.original_weight()), [])
        if len(shared) > 1 and not layer.merged:
            merge_checks.warn_of_untying(layer, shared, for_good)


def _is_watched(layer: DoraLayer, adapters: list[str]) -> bool:
    """Whether a module of these adapters has hooks of the user's."""
    return any(
        called.has_hooks(module)
        for name in adapters
        for module in (*layer.factor_modules(name), layer.lora_dropout[name], layer.lora_magnitude_vector[name])
    )


def merge_layers(
    model: nn.Module,
    adapter_names: list[str] | None,
    safe_merge: bool,
    offload_original: bool,
    progressbar: bool = False,
) -> None:
    """Merge the adapters of every DoRA layer; see `DoraModel.merge_adapter`."""
    owners = merge_checks.owners_of_weights(model)
    layers = [module for module in model.modules() if isinstance(module, DoraLayer)]
    for layer in tqdm(layers, disable=not progressbar, desc="Merging"):
        alone = len(owners.get(id(layer.original_weight()), ())) < 2
        with onload_layer(layer):
            layer.merge(safe_merge, adapter_names, offload_original=offload_original and alone)


def unmerge_layers(model: nn.Module) -> None:
    """Unmerge every adapted layer.

    A merged weight whose original was offloaded changes places with it: until all layers are unmerged it is kept, and
    the device may not have room for both.
    """
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        with onload_layer(layer):
            original = layer._original[0] if isinstance(layer, DoraLayer) and layer._original is not None else None
            offloaded = original is not None and original.device.type == "cpu"
            merged = layer.get_base_layer()._parameters.get("weight")
            layer.unmerge()
            if offloaded and type(merged) is nn.Parameter:
                merged.data = merged.data.cpu()


def remember_token_tables(model: nn.Module) -> None:
    """Have embeddings restored into which PEFT merges trained tokens: it gives the same parameter other data."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            weight = module.get_base_layer().weight
            if isinstance(weight, nn.Parameter):
                remember(weight, weight.data)
