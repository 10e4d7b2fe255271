"""Codes of a few bits, packed one after the other into 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first codes of each row, code i in bits i * bits onwards of the row's words, lowest first.

    Codes may cross a border of words, as those of 3 bits do.

    Args:
        words: int32, [rows, n].
        bits: 1 to 8.
        count: How many codes a row has.

    Returns:
        [rows, count], int32, 0 to 2 ** bits - 1.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        # an arithmetic shift: the mask removes the copies of the sign
        fields = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
        return fields.flatten(1)[:, :count]
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    both = wide[:, word] | (wide[:, word + 1] << 32)
    return ((both >> shift) & ((1 << bits) - 1)).int()
