"""Weights that cannot be read at all, such as GPTQ's and AWQ's: the layer is called instead."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .base import BLOCK_BYTES, BaseWeight
from .inspection import compute_dtype, linear_map


class Opaque(BaseWeight):
    """A base that is only a linear map: called without its bias, or less that, it gives A W0^T for A, and its columns
    for blocks of unit vectors.

    It is called in the dtype that it computes in, see `compute_dtype`.
    """

    has_rows = False
    mergeable = False

    def __init__(self, layer: nn.Module, out_features: int, in_features: int) -> None:
        self.layer = layer
        self.compute_dtype = compute_dtype(layer, in_features)
        tensors = [*layer.parameters(), *layer.buffers()]
        super().__init__(out_features, in_features, torch.float32, tensors[0].device)

    def _product(self, x: Tensor) -> Tensor:
        """x W0^T [N, out] without b, for x [N, in]."""
        x = x.to(self.compute_dtype)
        module, bias = linear_map(self.layer, x)
        y = module(x).to(self.dtype)
        return y if bias is None else y - bias.to(self.dtype)

    def _columns(self) -> Iterator[Tensor]:
        """W0^T [in, out] in blocks of rows."""
        step = max(1, BLOCK_BYTES // (max(self.out_features, self.in_features) * 4))
        for start in range(0, self.in_features, step):
            stop = min(start + step, self.in_features)
            unit = torch.zeros(stop - start, self.in_features, device=self.device)
            unit[:, start:stop].fill_diagonal_(1)
            yield self._product(unit)

    def row_norms_squared(self) -> Tensor:
        out = torch.zeros(self.out_features, dtype=self.dtype, device=self.device)
        for columns in self._columns():
            out += columns.square_().sum(0)
        return out

    def times(self, lora_A: Tensor) -> Tensor:
        return self._product(lora_A).T

    def vjp(self, grad: Tensor) -> Tensor:
        return torch.cat([columns @ grad for columns in self._columns()]).T
