"""Codes in words: what Python's own integers hold."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_peft.adapters.export.codes.bits import unpack


@given(bits=st.integers(1, 8), rows=st.lists(st.lists(st.integers(0, 255), min_size=45, max_size=45), min_size=1))
def test_codes_lie_one_after_the_other_from_the_lowest_bit(bits, rows):
    words, expected = [], []
    for row in rows[:4]:
        values = [value % 2**bits for value in row]
        stream = sum(value << (i * bits) for i, value in enumerate(values))
        found = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-45 * bits // 32))]
        words.append([word - 2**32 if word >= 2**31 else word for word in found])
        expected.append(values)
    assert unpack(torch.tensor(words, dtype=torch.int32), bits, 45).tolist() == expected
