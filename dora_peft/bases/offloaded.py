"""A weight of any kind that accelerate keeps elsewhere between calls, see offload.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

from torch import Tensor, nn

from .base import BaseWeight
from .inspection import FLOATS
from .offload import at_hand, execution_device


class Offloaded(BaseWeight):
    """A weight that accelerate keeps elsewhere: each method brings it in, and lets it go again.

    Merging brings it in for all of its steps, so `keep_original` and what belongs to it are not needed here.

    Args:
        layer: The base layer, see `offload.is_away`.
        look: Gives the seam for it while its weight is here.
    """

    def __init__(self, layer: nn.Module, look: Callable[[], BaseWeight]) -> None:
        self.layer, self.look = layer, look
        weight = getattr(layer, "weight", None)
        # a dense weight has its shape and dtype on the meta device too
        dense = isinstance(weight, Tensor) and weight.dtype in FLOATS
        with nullcontext() if dense else at_hand(layer):
            seen = look()
        super().__init__(seen.out_features, seen.in_features, seen.dtype, execution_device(layer))
        self.has_rows, self.mergeable, self.dense_rows = seen.has_rows, seen.mergeable, seen.dense_rows

    def block(self, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        with at_hand(self.layer):
            return self.look().block(start, stop, memory)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        with at_hand(self.layer):
            yield from self.look().blocks()

    def rows(self, index: Tensor) -> Tensor:
        with at_hand(self.layer):
            return self.look().rows(index)

    def dense(self) -> Tensor:
        with at_hand(self.layer):
            return self.look().dense()

    def row_norms_squared(self) -> Tensor:
        with at_hand(self.layer):
            return self.look().row_norms_squared()

    def times(self, lora_A: Tensor) -> Tensor:
        with at_hand(self.layer):
            return self.look().times(lora_A)

    def vjp(self, grad: Tensor) -> Tensor:
        with at_hand(self.layer):
            return self.look().vjp(grad)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> nn.Parameter:
        with at_hand(self.layer):
            return self.look().replacement(rows)
