"""What norms and formulas need of an adapted layer, whoever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ..bases import BaseWeight
from .records import BaseNorm, Norm, Stored


class AdaptedLayer(Protocol):
    """A DoraLayer, or the view of one of PEFT's own layers while `accelerate_use_dora()` is on.

    Attributes:
        name: The module's, for messages.
        scaling: s of each adapter.
        magnitude_only: Whether an adapter trains m alone.
        training: As of nn.Module.
        _norms, _base_norm: What is known about v, by adapter, and about ||W0||; written by norms/ alone.
        number: Stands for the layer in operators.
    """

    name: str
    number: int
    _norms: dict[str, Norm]
    _base_norm: BaseNorm | None

    @property
    def scaling(self) -> Mapping[str, float]: ...
    @property
    def magnitude_only(self) -> Mapping[str, bool]: ...
    @property
    def training(self) -> bool: ...

    def get_base_layer(self) -> nn.Module: ...

    def original_weight(self) -> Stored:
        """The base layer's weight without any merged adapter, as stored."""

    def base_weight(self, weight: Tensor | None = None) -> BaseWeight:
        """The seam to it, or to another weight in its place."""

    def factor_parameters(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B as stored."""

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same as [r, in] and [out, r] over the base weight's rows."""

    def magnitude(self, adapter: str) -> Tensor:
        """m as stored."""

    def initial_scaling(self, adapter: str) -> float:
        """s before anyone rescaled the adapter."""

    def settle_late(self, adapter: str) -> None:
        """Find out which rows are tied, for an adapter that was loaded while W0 was not here."""
