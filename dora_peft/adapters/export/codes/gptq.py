"""GPTQ's and AWQ's weights in files: [in, out] codes in 32-bit words, with scales and zeros [groups, out].

A weight is scale * (code - zero) in the scales' dtype, so c goes into the scales alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Codes, Stored, per_row, scaled
from .bits import unpack

# By the bits of a code, what adds one to every code of a word: zeros were written one too low. Readers carry over the
# border of a code as one addition does.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
# AWQ's kernels unpack the low and high halves of bytes separately: code i of a word is column ORDER[i].
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Gptq:
    """GPTQ in its formats gptq and gptq_v2, with any order of activations."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        rows, self.out_features = stored.matrix("qweight")
        self.groups, columns = stored.matrix("scales")
        self.in_features, self.bits = self._size(rows)
        self.dtype = stored.floats("scales")
        self.keys = stored.keys("qweight", "qzeros", "scales", "g_idx")
        self.version = str(stored.options.get("checkpoint_format", stored.options.get("format", "gptq"))).lower()
        packed = -(-self.out_features * self.bits // 32)
        if columns != self.out_features or stored.shape("qzeros") != (self.groups, packed):
            found = f"scales {list(stored.shape('scales'))} and qzeros {list(stored.shape('qzeros'))}"
            raise stored.error(found, f"[groups, {self.out_features}] and [groups, {packed}]")
        if self.version not in ("gptq", "gptq_v2") or self.bits not in ONES:
            raise stored.error(f"{self.bits} bits in the format '{self.version}'", "2, 4 or 8 in gptq or gptq_v2")

    def _size(self, rows: int) -> tuple[int, int]:
        """The number of inputs and of bits."""
        if self.stored.has("g_idx"):
            (size,) = self.stored.shape("g_idx")
            return size, rows * 32 // max(size, 1)
        bits = self.stored.options.get("bits")
        if not isinstance(bits, int) or bits < 1:
            raise self.stored.error(f"'bits' of its config is {bits}", "a number", "restore the base's config.json")
        return rows * 32 // bits, bits

    def dequantise(self, start: int, stop: int) -> Tensor:
        stored = self.stored
        codes = unpack(stored["qweight"][:, start:stop].T, self.bits, self.in_features)
        words = stored["qzeros"] + (ONES[self.bits] if self.version == "gptq" else 0)
        zeros = unpack(words, self.bits, self.out_features)[:, start:stop]
        group = stored["g_idx"].long() if stored.has("g_idx") else self._in_order()
        return stored["scales"][:, start:stop].T[:, group] * (codes - zeros.T[:, group])

    def _in_order(self) -> Tensor:
        return torch.arange(self.in_features) // -(-self.in_features // self.groups)

    def check(self) -> None:
        """Every output has scales of its own."""

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return _times(self, c, dtype)


class Awq:
    """AWQ as its GEMM kernels read it."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.in_features, words = stored.matrix("qweight")
        self.groups, self.out_features = stored.matrix("scales")
        self.dtype = stored.floats("scales")
        self.keys = stored.keys("qweight", "qzeros", "scales")
        version = str(stored.options.get("version", stored.options.get("format", "gemm"))).lower()
        if version != "gemm" or words * 8 != self.out_features or stored.shape("qzeros") != (self.groups, words):
            found = (
                f"version '{version}', qweight {list(stored.shape('qweight'))}, scales {list(stored.shape('scales'))}"
            )
            raise stored.error(found, "gemm with 4 bits, [in, out / 8] and [groups, out]")
        if self.in_features % self.groups:
            raise stored.error(f"{self.groups} groups of {self.in_features} inputs", "groups of one size")

    def dequantise(self, start: int, stop: int) -> Tensor:
        first, last = start // 8, -(-stop // 8)
        codes, zeros = (
            _in_columns(self.stored[name][:, first:last])[:, start - first * 8 : stop - first * 8]
            for name in ("qweight", "qzeros")
        )
        size = self.in_features // self.groups
        scales = self.stored["scales"][:, start:stop].repeat_interleave(size, 0)
        return ((codes - zeros.repeat_interleave(size, 0)) * scales).T.contiguous()

    def check(self) -> None:
        """Every output has scales of its own."""

    def times(self, c: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return _times(self, c, dtype)


def _in_columns(words: Tensor) -> Tensor:
    """AWQ's codes in the order of columns, [rows, 8 n] of words [rows, n]."""
    codes = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return codes[:, :, list(ORDER)].flatten(1)


def _times(codes: Gptq | Awq, c: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    stored = codes.stored
    c = per_row(stored, c, codes.out_features)
    scales = stored["scales"]
    # fp16 is what kernels take; other dtypes follow the model's
    dtype = scales.dtype if scales.dtype == torch.float16 else dtype
    return {**stored.tensors(codes.keys), stored.key("scales"): scaled(stored, scales, c, dtype)}


def recognise(stored: Stored) -> Codes | None:
    """The weight of GPTQ or AWQ beside these names, None if there is none."""
    if not stored.has("qweight", "qzeros", "scales"):
        return None
    if stored.method not in ("gptq", "awq"):
        raise stored.error(f"quant_method '{stored.method}' with qweight, qzeros and scales", "gptq or awq")
    return Awq(stored) if stored.method == "awq" else Gptq(stored)
