"""bitsandbytes' weights in files: nf4 and fp4, whose blocks run along the flattened weight, and int8 with row scales.

bitsandbytes itself is not needed: a 4-bit weight is code * absmax of its block in fp32, rounded to the dtype it had.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from .base import Codes, Stored, per_row, scaled

STATE = "weight.quant_state.bitsandbytes__"
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
# bitsandbytes multiplies by this rather than divide by 127
PER_STEP = 7.874015718698502e-3


class FourBit:
    """nf4 or fp4.

    Nested statistics, which are absmax quantised once more, are undone by `times`: absmax becomes fp32, 4 bytes instead
    of 1 for each block, and stays so exact. `dtype` there becomes what the weight is unpacked to.
    """

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.name = next(name for name in stored.names if name.startswith(STATE))
        self.state = self._state()
        shape = self.state.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2):
            raise stored.error(f"its state says shape {shape}", "two dimensions")
        self.out_features, self.in_features = int(shape[0]), int(shape[1])
        self.block = _whole(self.state.get("blocksize"))
        dtype = getattr(torch, str(self.state.get("dtype")), None)
        if self.block < 1 or not isinstance(dtype, torch.dtype):
            raise stored.error(f"its state is {self.state}", "a blocksize and a dtype", "download the base again")
        self.dtype: torch.dtype = dtype
        self.keys = stored.keys("weight", "weight.absmax", "weight.quant_map", *NESTED, self.name)

    def _state(self) -> dict[str, object]:
        try:
            found = json.loads(bytes(self.stored[self.name].tolist()))
        except ValueError as error:
            raise self.stored.error(
                "its state is no JSON", "that of bitsandbytes", "download the base again"
            ) from error
        return found if isinstance(found, dict) else {}

    @property
    def absmax(self) -> Tensor:
        """The largest absolute value of each block, [blocks] in fp32."""
        stored = self.stored
        found = stored["weight.absmax"]
        if not stored.has("weight.nested_absmax"):
            return found.float()
        size = _whole(self.state.get("nested_blocksize"))
        outer = stored["weight.nested_absmax"].float().repeat_interleave(size)[: found.numel()]
        offset = self.state.get("nested_offset")
        inner = stored["weight.nested_quant_map"].float()[found.int()]
        return inner * outer + torch.tensor(offset, dtype=torch.float32)

    def dequantise(self, start: int, stop: int) -> Tensor:
        low, high = start * self.in_features, stop * self.in_features
        # from the block that the first number is in
        first = low // self.block * self.block
        packed = self.stored["weight"].view(torch.uint8).flatten()[first // 2 : -(-high // 2)]
        pairs = torch.stack((packed >> 4, packed & 0xF), dim=1).flatten()[low - first : high - first]
        scales = self.absmax[first // self.block : -(-high // self.block)].repeat_interleave(self.block)
        found = self.stored["weight.quant_map"].float()[pairs.int()] * scales[low - first : high - first]
        return found.to(self.dtype).view(stop - start, self.in_features)

    def check(self) -> None:
        if self.in_features % self.block:
            raise self.stored.error(
                f"its blocks of {self.block} run across rows of {self.in_features}", "rows that end on blocks"
            )

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        self.check()
        c = per_row(self.stored, c, self.out_features)
        absmax = scaled(self.stored, self.absmax.view(self.out_features, -1), c[:, None])
        state = {key: value for key, value in self.state.items() if not key.startswith("nested_")}
        if dtype is not None:
            # what the weight is rounded to when it is unpacked: in bf16 most c would be lost there
            state["dtype"] = str(dtype).removeprefix("torch.")
        nested = self.stored.keys(*NESTED)
        kept = tuple(key for key in self.keys if key not in nested)
        return {
            **self.stored.tensors(kept),
            self.stored.key("weight.absmax"): absmax.flatten(),
            self.stored.key(self.name): torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }


class EightBit:
    """int8: a row is CB * SCB / 127."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.out_features, self.in_features = stored.matrix("weight")
        self.dtype = torch.float32
        self.keys = stored.keys("weight", "SCB", "weight_format")
        if stored.shape("SCB") != (self.out_features,):
            raise stored.error(f"SCB is of shape {list(stored.shape('SCB'))}", f"[{self.out_features}]")

    def dequantise(self, start: int, stop: int) -> Tensor:
        return self.stored["weight"][start:stop] * self.stored["SCB"].float()[start:stop, None] * PER_STEP

    def check(self) -> None:
        if self.stored.has("weight_format") and int(self.stored["weight_format"]):
            raise self.stored.error("its codes are in the layout of a GPU", "rows", "save it by bitsandbytes >= 0.45")

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        self.check()
        c = per_row(self.stored, c, self.out_features)
        # its kernels take fp32 alone
        scb = scaled(self.stored, self.stored["SCB"].float(), c)
        return {**self.stored.tensors(self.keys), self.stored.key("SCB"): scb}


def recognise(stored: Stored) -> Codes | None:
    """The weight of bitsandbytes beside these names, None if there is none."""
    if any(name.startswith(STATE) for name in stored.names):
        return FourBit(stored)
    return EightBit(stored) if stored.has("weight", "SCB") else None


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
