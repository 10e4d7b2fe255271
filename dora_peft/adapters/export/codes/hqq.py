"""HQQ's weights in files: codes `W_q` of 8 to 1 bits, with a scale and a zero for each group of one row.

A weight is (code - zero) * scale in HQQ's compute dtype, so c goes into the scale alone. What else describes a layer is
stored in tensors too: numbers as scalars, texts as their characters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Codes, Stored, per_row, scaled

# Where in a word the codes of one packing lie: the first part of all groups in the first of these, and so on.
SHIFTS: dict[str, tuple[int, ...]] = {
    "8bit_u8": (0,),
    "4bit_u8": (4, 0),
    "3bit_32": (27, 24, 21, 18, 15, 12, 9, 6, 3, 0),
    "2bit_u8": (6, 4, 2, 0),
    "1bit_u8": (7, 6, 5, 4, 3, 2, 1, 0),
}
# What describes the layer, and does not change.
REST = (
    "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


class Hqq:
    """HQQ with groups along rows (axis 1), or, which cannot take c, across them (axis 0)."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.out_features, self.in_features = self._shape()
        self.packing = self._text("packing")
        self.axis = self._number("axis")
        if self.packing not in SHIFTS or self.axis not in (0, 1) or self._number("view_as_float"):
            found = f"packing '{self.packing}', axis {self.axis}, view_as_float {bool(self._number('view_as_float'))}"
            raise stored.error(found, f"one of {', '.join(SHIFTS)}, axis 0 or 1, whole numbers")
        if any(self._number(name) for name in ("quant_scale", "quant_zero") if stored.has(name)):
            raise stored.error("its scales or zeros are quantised themselves", "floating point")
        self.dtype = stored.floats("scale")
        self.keys = stored.keys("W_q", "scale", *REST)
        # HQQ groups a view of the weight: [groups, size] along rows, [size, groups] across them
        groups = math.prod(stored.shape("scale"))
        self.columns = self.out_features * self.in_features // groups if self.axis else groups

    def _shape(self) -> tuple[int, int]:
        shape = self.stored["shape"].flatten().tolist()
        if len(shape) != 2:
            raise self.stored.error(f"it is of shape {shape}", "two dimensions")
        return int(shape[0]), int(shape[1])

    def _number(self, name: str) -> int:
        return int(self.stored[name]) if self.stored.has(name) else 0

    def _text(self, name: str) -> str:
        return "".join(chr(code) for code in self.stored[name].tolist()) if self.stored.has(name) else ""

    def dequantise(self, start: int, stop: int) -> Tensor:
        shifts = torch.tensor(SHIFTS[self.packing], dtype=torch.int32)
        words = self.stored["W_q"].view(-1, self.columns)
        low, high = start * self.in_features, stop * self.in_features
        # rows of the view that hold these numbers
        rows = torch.arange(low // self.columns, -(-high // self.columns))
        bits = int(shifts[-2] - shifts[-1]) if len(shifts) > 1 else 8
        shift = shifts[rows // len(words)][:, None]
        codes = ((words[rows % len(words)].int() >> shift) & ((1 << bits) - 1)).to(self.dtype)
        zero, scale = (self.stored[name].view(-1, 1 if self.axis else self.columns) for name in ("zero", "scale"))
        if self.axis:
            zero, scale = zero[rows], scale[rows]
        found = ((codes - zero) * scale).flatten()
        skipped = low % self.columns
        return found[skipped : skipped + high - low].view(stop - start, self.in_features)

    def check(self) -> None:
        if not self.axis:
            raise self.stored.error("its groups run across rows (axis 0)", "groups along rows (axis 1)")
        if self.in_features % self.columns:
            found = f"its groups of {self.columns} run across rows of {self.in_features}"
            raise self.stored.error(found, "rows that end on groups")

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        self.check()
        stored = self.stored
        c = per_row(stored, c, self.out_features)
        scale = stored["scale"]
        # loading casts both to the compute dtype, so one that c does not survive in is changed with them
        dtype = dtype if dtype is not None and self.dtype == torch.bfloat16 else self.dtype
        changed = {
            stored.key("scale"): scaled(stored, scale.view(self.out_features, -1), c[:, None], dtype).view_as(scale)
        }
        if dtype != self.dtype:
            changed[stored.key("zero")] = stored["zero"].to(dtype)
            changed[stored.key("compute_dtype")] = torch.tensor([ord(one) for one in str(dtype)], dtype=torch.uint8)
        return {**stored.tensors(self.keys), **changed}


def recognise(stored: Stored) -> Codes | None:
    """The weight of HQQ beside these names, None if there is none."""
    if not stored.has("W_q"):
        return None
    if not stored.has("scale", "zero", "shape", "axis", "packing"):
        raise stored.error(f"beside W_q are {', '.join(stored.names)}", "scale, zero, shape, axis and packing")
    return Hqq(stored)
