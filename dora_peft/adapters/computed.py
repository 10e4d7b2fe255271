"""Adapters whose A, B or m are computed from other tensors: masks (prune), parametrizations, weight_norm.

A file holds A, B and m as they are used, so that plain PEFT and a model without masks give the same outputs. What they
are computed from stays in the model, and loading into a tensor that is computed would be undone by the next call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import DoraLayer, called

_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def _computed(layer: DoraLayer, adapter: str) -> list[tuple[str, nn.Module, str]]:
    """The attribute, the holder and the name of the tensor, for each of A, B and m that is computed."""
    found = []
    for part in _PARTS:
        held = getattr(layer, part)
        if adapter not in held:
            continue
        holder, name = (held, adapter) if isinstance(held, nn.ParameterDict) else (held[adapter], "weight")
        if called.is_computed(holder) and name not in holder._parameters:
            found.append((part, holder, name))
    return found


@torch.no_grad()
def to_values(layer: DoraLayer, adapter: str, prefix: str, infix: str, tensors: dict[str, Tensor]) -> None:
    """Replace what A, B and m are computed from by what they are, in the tensors of one adapter to be saved.

    Raises:
        ValueError: The tensors are others than the model's own, such as an average.
    """
    for part, holder, name in _computed(layer, adapter):
        sources = [key for key in tensors if key.startswith(f"{prefix}{part}")]
        if not sources:
            continue
        own = [*holder.parameters(), *holder.buffers()]
        for key in sources:
            found = tensors[key]
            if not any(found.shape == tensor.shape and torch.equal(found.to(tensor.device), tensor) for tensor in own):
                raise ValueError(
                    f"Cannot save adapter '{adapter}' of module '{layer.name}': its {part} is computed from other "
                    f"tensors (prune, parametrize), and '{key}' is not the model's own. Save the model's own tensors, "
                    "or remove the masks or parametrizations first."
                )
            del tensors[key]
        called.write_weights(holder)
        value = getattr(holder, name).detach().clone()
        suffix = "" if isinstance(holder, nn.ParameterDict) else ".weight"
        tensors[f"{prefix}{part}{infix}{suffix}"] = value


def check_loadable(layers: list[tuple[str, DoraLayer]], adapter: str) -> None:
    """Refuse to load into tensors that are computed.

    Raises:
        ValueError: Some are. Nothing has been loaded.
    """
    found = [f"{name}.{part}" for name, layer in layers for part, _, _ in _computed(layer, adapter)]
    if found:
        raise ValueError(
            f"Cannot load DoRA adapter '{adapter}' into {', '.join(found[:3])}{' ...' * (len(found) > 3)}: these are "
            "computed from other tensors (torch.nn.utils.prune, parametrize). Nothing was loaded. Remove the masks or "
            "parametrizations (prune.remove, parametrize.remove_parametrizations), load, and put them on again."
        )
