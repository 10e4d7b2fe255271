"""The parts of the linear function by themselves."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from linear_fixtures import BF16, FP32, FP64, LENGTHS, ROUNDING, Made, distance, randn
from torch.multiprocessing.reductions import StorageWeakRef

from dora_peft.ops import linear_parts as parts
from dora_peft.ops.chunks import CHUNK

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("keep_scaled", [False, True])
def test_scale_and_sum(keep_scaled, dtype, n):
    wide = FP64 if dtype is FP64 else FP32
    g, y, weight = randn(n, 7, seed=1).to(dtype), randn(n, 7, seed=2).to(dtype), randn(7, 9, seed=3).to(dtype)
    c, b = randn(7, seed=4).to(wide), randn(7, seed=5).to(dtype)
    for with_y, with_bias, with_weight in product([False, True], repeat=3):
        result, scaled, sums = parts.scale_and_sum(
            g,
            c,
            y if with_y else None,
            b if with_bias else None,
            weight if with_weight else None,
            F.linear,
            keep_scaled=keep_scaled,
        )
        # in one pass all is made as a whole, unless that would round
        whole = with_weight and with_y and 0 < n <= CHUNK and dtype is wide
        assert (result is not None, sums is not None) == (with_weight, with_y)
        assert (scaled is not None) == (keep_scaled or whole)
        rounded = (g.double() * c.double()).to(dtype)
        if scaled is not None:
            assert scaled.dtype == dtype
            assert distance(scaled, rounded) <= 2 * ROUNDING[dtype]
        if result is not None:
            assert result.dtype == dtype
            assert distance(result, rounded.double() @ weight.double()) <= 4 * ROUNDING[dtype]
        if sums is not None:
            terms = g.double() * (y.double() - b.double() * with_bias)
            assert sums.dtype == wide
            error = (sums.double() - terms.sum(0)).abs()
            assert (error <= 4 * n**0.5 * ROUNDING[wide] * terms.norm(dim=0)).all()


def test_scale_and_sum_takes_no_more_than_a_chunk_at_once():
    """On a CPU no temporary is longer than CHUNK tokens, whatever their number."""
    n = 4 * CHUNK + 1
    g, y, weight = randn(n, 40).to(BF16), randn(n, 40).to(BF16), randn(40, 3).to(BF16)
    with Made() as made:
        parts.scale_and_sum(g, torch.ones(40), y, torch.ones(40), weight, F.linear, keep_scaled=False)
    given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in (g, y, weight)}
    largest = max(size for ref, size in made.storages.items() if ref.cdata not in given)
    assert largest <= CHUNK * 40 * 4
