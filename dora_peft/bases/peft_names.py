"""What PEFT knows about base models but offers under private names only, as in 0.20.0 to 0.21.2.

Rules of PEFT's own that must not differ here: which layers "all-linear" means, and how long the sides of a layer are.
"""

from __future__ import annotations

import copy

from peft import PeftConfig
from peft.tuners.tuners_utils import _get_in_out_features, _maybe_include_all_linear_layers
from torch import nn


def all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    """The names of all linear layers but the output layer, which depends on the config's task_type."""
    everything = copy.copy(config)
    everything.target_modules = "all-linear"  # type: ignore[attr-defined]
    _maybe_include_all_linear_layers(everything, model)
    return everything.target_modules  # type: ignore[attr-defined]


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """The sizes of a layer's input and output; for a convolution, its channels.

    Raises:
        ValueError: PEFT does not know the layer.
    """
    in_features, out_features = _get_in_out_features(layer)
    if in_features is None or out_features is None:
        raise ValueError(f"Expected a layer with an input and an output size, found {type(layer).__name__}.")
    return in_features, out_features
