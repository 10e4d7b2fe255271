"""Weights of 8-bit floats with scales in fp32: fbgemm's by row, DeepSeek's by blocks of 128 x 128, others by tensor.

A weight is its 8-bit float * scale, in fp32. Only scales of one row each can take c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Codes, Stored, per_row, scaled

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8:
    """8-bit floats with a scale for each block of rows and columns."""

    def __init__(self, stored: Stored, scale: str) -> None:
        self.stored, self.scale = stored, scale
        self.out_features, self.in_features = stored.matrix("weight")
        self.dtype = torch.float32
        self.keys = stored.keys("weight", scale)
        # MXFP8: a scale is an exponent
        self.powers = stored.dtype(scale) in (torch.uint8, torch.float8_e8m0fnu)
        if not self.powers:
            stored.floats(scale)
        shape = stored.shape(scale)
        # [rows] is read as [rows, 1]
        self.grid = (shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1)
        self.block = self._block()

    def _block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        given = self.stored.options.get("weight_block_size")
        if isinstance(given, list) and len(given) == 2 and self.scale == "weight_scale_inv":
            rows, columns = int(given[0]), int(given[1])
        else:
            rows, columns = -(-self.out_features // self.grid[0]), -(-self.in_features // self.grid[1])
        if (-(-self.out_features // rows), -(-self.in_features // columns)) != self.grid:
            found = f"scales {list(self.grid)} for a weight of {self.out_features} x {self.in_features}"
            raise self.stored.error(found, f"one for each {rows} x {columns}", "restore the base's config.json")
        return rows, columns

    def dequantise(self, start: int, stop: int) -> Tensor:
        rows, columns = self.block
        found = self.stored[self.scale]
        scales = (found.float() - 127).exp2() if found.dtype == torch.uint8 else found.float()
        scales = scales.reshape(self.grid)[torch.arange(start, stop) // rows].repeat_interleave(columns, 1)[
            :, : self.in_features
        ]
        return self.stored["weight"][start:stop].float() * scales

    def check(self) -> None:
        rows, columns = self.block
        if self.powers:
            raise self.stored.error("its scales are powers of two", "scales with digits and a sign")
        if rows != 1 and self.out_features != 1:
            whole = self.grid == (1, 1)
            found = "one scale for the whole tensor" if whole else f"scales for blocks of {rows} x {columns}"
            raise self.stored.error(f"it has {found}", "a scale for each row")

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        self.check()
        stored = self.stored
        c = per_row(stored, c, self.out_features)
        scale = stored[self.scale]
        by_row = scaled(stored, scale.float().reshape(self.grid), c[:, None])
        return {**stored.tensors(self.keys), stored.key(self.scale): by_row.view(scale.shape)}


def recognise(stored: Stored) -> Codes | None:
    """The weight in 8-bit floats beside these names, None if there is none."""
    if not stored.has("weight") or stored.dtype("weight") not in FP8:
        return None
    scales = [name for name in ("weight_scale", "weight_scale_inv") if stored.has(name)]
    if not scales:
        raise stored.error(f"{stored.dtype('weight')} without scales", "'weight_scale' or 'weight_scale_inv'")
    return Fp8(stored, scales[0])
