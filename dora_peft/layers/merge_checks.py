"""What has to be known about a whole model before one of its base weights is written: who else uses it.

Two modules may share a weight parameter: merging gives the adapted one a parameter of its own, and says so. One module
object may stand in the model under two names, of which only one leads through the adapter: a merged weight would change
the other as well, so merging is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def note_other_names(model: nn.Module, layers: list[tuple[str, Any]]) -> None:
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
            layer = bases.get(id(child))
            if layer is not None and not any(module is parent for module in layer.modules()):
                layer.other_names.append(f"{name}.{child_name}" if name else child_name)


def owners_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """By the id of a parameter, the names of the modules that hold it; a module under several names counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{attribute}" if name else attribute)
    return owners


def warn_of_untying(layer: Any, owners: list[str], unmergeable_later: bool) -> None:
    """Say that merging gives `layer` a weight of its own. `unmergeable_later`: it stays merged for good."""
    again = "" if unmergeable_later else " Unmerging ties them again."
    warnings.warn(
        f"Merging unties module '{layer.name}': its weight is shared ({', '.join(sorted(owners))}), and only the "
        f"adapted module gets the merged one.{again}",
        stacklevel=3,
    )
