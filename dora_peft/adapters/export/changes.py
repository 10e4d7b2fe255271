"""What adapters change in each module, W' - W0, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops import merging
from .adapted import AdaptedBase, Parts, kernel_of
from .lowrank import Change
from .splitting import Split, split


class ModuleChange:
    """dW = W' - W0 of one module, see `lowrank.Change`."""

    def __init__(self, adapted: AdaptedBase, path: str) -> None:
        self.path = path
        self._adapted = adapted
        self._parts: Parts | None = None
        with adapted.at_hand(path) as layer:
            weight, base = layer.base_weight(), layer.get_base_layer()
            self.out_features, self.in_features = weight.out_features, weight.in_features
            self.embedding = isinstance(base, nn.Embedding)
            self.kernel = kernel_of(base)
            self._parts = adapted.parts(path, layer)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows start:stop of dW in fp32)."""
        assert self._parts is not None
        with self._adapted.at_hand(self.path) as layer:
            for start, stop, rows in layer.base_weight().blocks():
                # the gradients' state of whoever walks is another one at each step
                with torch.no_grad():
                    new = merging.merged_rows(rows.clone(), start, stop, self._parts)
                    change = new.sub_(rows).float()
                yield start, stop, change

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the part of low rank, with s and c inside B."""
        return self._split.lora_A, self._split.lora_B

    def scale_change(self) -> Tensor:
        """c - 1, [out]."""
        return self._split.scale - 1

    @property
    def _split(self) -> Split:
        assert self._parts is not None
        return split(self._parts)


def changes(adapted: AdaptedBase) -> Iterator[Change]:
    """The changes of all modules, one after the other."""
    for path in adapted.layers:
        yield ModuleChange(adapted, path)
