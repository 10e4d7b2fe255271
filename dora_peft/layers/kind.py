"""What differs between linear layers, embeddings and convolutions, as functions of the base layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..norms import AdaptedLayer
from ..ops.overwritten import Outputs


class ComputingLayer(AdaptedLayer, Protocol):
    """What computing an output needs of an adapted layer, see `AdaptedLayer`.

    Attributes:
        kind: How it computes.
        base_layer: What it wraps, perhaps another wrapper.
        lora_dropout, lora_magnitude_vector: Modules of each adapter.
        detach_norm, dropout_mode: The options of each adapter.
        _outputs: What is known about the layer's outputs.
    """

    kind: Kind
    _outputs: Outputs

    @property
    def base_layer(self) -> nn.Module: ...
    @property
    def lora_dropout(self) -> nn.ModuleDict: ...
    @property
    def detach_norm(self) -> Mapping[str, bool]: ...
    @property
    def dropout_mode(self) -> Mapping[str, str]: ...
    @property
    def lora_magnitude_vector(self) -> nn.ModuleDict: ...

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]:
        """What holds A and B: a module of each, or the dictionary of an embedding's."""

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...
    def _get_embed_scale(self) -> Tensor | float | None: ...


class Kind:
    """One kind of base layer. Without state: each method gets the base layer itself, as `get_base_layer()` gives it."""

    # Whether dropout acts on the input; ids have none.
    drops = True
    # Whether A and B are modules; an embedding's are parameters.
    calls = True

    def multiplies(self, base: nn.Module, forward: object) -> bool:
        """Whether `multiply` computes what this forward method of a base layer does, but for b."""
        return False

    def oriented(self, base: nn.Module, weight: Tensor) -> Tensor:
        """The base layer's weight as `multiply` takes it."""
        return weight

    def multiply(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """x W0^T without b, differentiable."""
        raise NotImplementedError

    def low_rank(self, layer: ComputingLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """s B A x, in the shape of the layer's output."""
        raise NotImplementedError

    def matrix(self, base: nn.Module, weight: Tensor) -> Tensor:
        """W0 [out, in] as a view of the base layer's weight."""
        return weight

    def in_layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the shape of the base layer's weight."""
        return matrix

    def as_matrices(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] over the rows of W0."""
        return lora_A, lora_B

    def magnitude_shape(self, base: nn.Module, out_features: int) -> tuple[int, ...]:
        """The shape in which m is stored."""
        return (out_features,)

    def per_channel(self, base: nn.Module, vector: Tensor) -> Tensor:
        """[out] in the shape that broadcasts against the layer's output."""
        return vector

    def computes_otherwise(self, base: nn.Module) -> bool:
        """Whether `base` is no plain layer of this kind, but has another forward over a plain weight."""
        return False

    def merge_obstacle(self, base: nn.Module) -> str | None:
        """Why W' is no weight of the base layer's kind, None if it is one."""
        return None
