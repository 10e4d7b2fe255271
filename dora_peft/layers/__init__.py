"""What an adapted layer holds, and how each kind of layer computes.

kind.py        what differs between the kinds, and what computing needs of a layer
layer.py       DoraLayer: state and life cycle
create.py      making an adapter on a layer
forward.py     the output of any kind of layer
scale.py       c = m / v
linear.py, embedding.py, conv.py   the kinds
called.py      when the adapter's modules have to be called: hooks, masks, parametrizations
shortcut.py    the pass of a linear layer that computes as it did last time
magnitude.py   m as a module
merge.py, merge_checks.py   writing W' into the base layer
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .layer import DoraLayer
from .linear import Linear

__all__ = ["DoraLayer", "layer_class", "layers_of"]

# nn.MultiheadAttention has none: it reads the weight of its output layer without calling the layer.
_CLASSES: tuple[tuple[type[nn.Module], type[DoraLayer] | None], ...] = (
    (nn.Embedding, Embedding),
    (nn.Conv1d, Conv1d),
    (nn.Conv2d, Conv2d),
    (nn.Conv3d, Conv3d),
    (nn.MultiheadAttention, None),
    (nn.Linear, Linear),
    (Conv1D, Linear),
)


def layer_class(base_layer: nn.Module) -> type[DoraLayer] | None:
    """The class that adapts `base_layer`, None if there is none."""
    for base_class, cls in _CLASSES:
        if isinstance(base_layer, base_class):
            return cls
    # quantised linear layers that do not derive from nn.Linear
    quantised = hasattr(base_layer, "in_features") and hasattr(base_layer, "out_features")
    return Linear if quantised else None


def layers_of(model: nn.Module, adapter: str) -> list[tuple[str, DoraLayer]]:
    """The layers of a model that have this adapter, by name."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, DoraLayer)]
    return [(name, layer) for name, layer in named if adapter in layer.lora_magnitude_vector]
