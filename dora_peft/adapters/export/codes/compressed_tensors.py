"""compressed-tensors' weights in files, as vLLM's tools write them: pack-quantized, int-quantized and float-quantized.

A weight is (code - zero) * scale in the scales' dtype, so c goes into the scales alone. Codes are packed in words of 32
bits (`weight_packed`), or are a matrix of int8 or fp8 (`weight`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Codes, Stored, per_row, scaled
from .bits import unpack

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
METHOD = "compressed-tensors"


class Compressed:
    """Codes with a scale per row, or per group of one row."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.packed = stored.has("weight_packed")
        self.codes = "weight_packed" if self.packed else "weight"
        self.out_features, columns = stored.matrix(self.codes)
        self.in_features, self.bits = columns, 8
        if self.packed:
            self.in_features = int(stored["weight_shape"][-1])
            self.bits = columns * 32 // max(self.in_features, 1)
        self.dtype = stored.floats("weight_scale")
        self.keys = stored.keys(self.codes, "weight_scale", "weight_zero_point", "weight_shape")
        if self.packed and (self.bits not in (2, 4, 8) or columns != -(-self.in_features * self.bits // 32)):
            raise stored.error(f"{columns} words for a row of {self.in_features}", "codes of 2, 4 or 8 bits")
        if stored.has("weight_global_scale") or stored.has("weight_g_idx"):
            name = "weight_global_scale" if stored.has("weight_global_scale") else "weight_g_idx"
            raise stored.error(f"'{name}'", "a scale for each row or group of a row, in the order of inputs")
        self.groups = self._groups()

    def _groups(self) -> int:
        """How many scales a row has; 0 if rows have none of their own."""
        shape = self.stored.shape("weight_scale")
        rows, groups = shape if len(shape) == 2 else (shape[0] if shape else 1, 1)
        if rows != self.out_features or self.in_features % groups:
            if rows * groups == 1:
                return 0
            found = f"scales {list(shape)} for a weight of {self.out_features} x {self.in_features}"
            raise self.stored.error(found, "a scale for each row, group of a row, or tensor")
        return groups if shape else 0

    def dequantise(self, start: int, stop: int) -> Tensor:
        stored = self.stored
        codes = stored[self.codes][start:stop]
        if self.packed:
            codes = unpack(codes, self.bits, self.in_features) - (1 << (self.bits - 1))
        rows = slice(start, stop) if self.groups else slice(None)
        groups = self.groups or 1
        scale = stored["weight_scale"].reshape(-1, groups)[rows, :, None]
        found = codes.to(self.dtype).view(stop - start, groups, self.in_features // groups)
        if stored.has("weight_zero_point"):
            found = found - self._zeros()[rows, :, None].to(self.dtype)
        return (found * scale).flatten(1)

    def _zeros(self) -> Tensor:
        zeros = self.stored["weight_zero_point"]
        if self.packed and zeros.dtype == torch.int32:
            # packed along the rows
            zeros = unpack(zeros.T, self.bits, self.out_features).T - (1 << (self.bits - 1))
        return zeros.reshape(-1, self.groups or 1)

    def check(self) -> None:
        if not self.groups:
            raise self.stored.error("it has one scale for the whole tensor", "a scale for each row or group of a row")

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        self.check()
        stored = self.stored
        c = per_row(stored, c, self.out_features)
        scale = stored["weight_scale"]
        # readers cast 16-bit scales to the model's dtype
        dtype = dtype if self.dtype == torch.bfloat16 else self.dtype
        by_row = scaled(stored, scale.reshape(self.out_features, -1), c[:, None], dtype)
        return {**stored.tensors(self.keys), stored.key("weight_scale"): by_row.view(scale.shape)}


def recognise(stored: Stored) -> Codes | None:
    """The weight of compressed-tensors beside these names, None if there is none."""
    if stored.method != METHOD:
        return None
    if stored.has("weight_packed", "weight_scale", "weight_shape"):
        return Compressed(stored)
    codes = stored.has("weight", "weight_scale") and stored.dtype("weight") in EIGHT_BITS
    return Compressed(stored) if codes else None
