"""What has to be known about a whole model before one of its base weights is written: who else uses it.

Two modules may share a weight parameter: merging gives the adapted one another parameter, and says so. One module
object may stand in the model under two names, of which only one leads through the adapter: a merged weight would change
the other as well, so merging is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, cast

from torch import nn


class NamedLayer(Protocol):
    """What is used here of a `DoraLayer`, which is a module as well."""

    name: str
    other_names: list[str]

    def get_base_layer(self) -> nn.Module: ...


def note_other_names(model: nn.Module, layers: Sequence[tuple[str, NamedLayer]]) -> None:
    """Write into each DoRA layer's `other_names` under which names the model reaches its base module besides.

    Args:
        model: The model that holds them.
        layers: Its DoRA layers by name.
    """
    bases = {id(layer.get_base_layer()): layer for _, layer in layers}
    for _, layer in layers:
        layer.other_names = []
    for name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            wrapper = bases.get(id(child))
            if wrapper is not None and not any(part is parent for part in cast(nn.Module, wrapper).modules()):
                wrapper.other_names.append(f"{name}.{child_name}" if name else child_name)


def owners_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """By the id of a parameter, the names of the modules that hold it; a module under several names counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{attribute}" if name else attribute)
    return owners


def warn_of_untying(layer: NamedLayer, owners: list[str], for_good: bool) -> None:
    """Say that merging gives `layer` another weight than its sharers have.

    Args:
        layer: The layer that is going to be merged.
        owners: The names of the modules that hold its weight.
        for_good: Whether it cannot be unmerged later.
    """
    again = "" if for_good else " Unmerging ties them again."
    warnings.warn(
        f"Merging unties module '{layer.name}': its weight is shared ({', '.join(sorted(owners))}), and only the "
        f"adapted module gets the merged one.{again}",
        stacklevel=3,
    )
