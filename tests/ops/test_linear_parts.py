"""The parts of the linear function by themselves."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from linear_fixtures import BF16, FP32, FP64, LENGTHS, ROUNDING, Made, distance, randn
from torch.multiprocessing.reductions import StorageWeakRef

from dora_peft.ops import linear_autograd as parts
from dora_peft.ops.chunks import CHUNK, does_one_pass, in_chunks, in_one_pass
from dora_peft.ops.products import times_transposed

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


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_pass_equals_chunks(with_bias, dtype, layout):
    """For gradients of any layout, with rows of c that are 0 or negative."""
    n, width = 130, 11
    g, y, c, b = randn(n, width, seed=1), randn(n, width, seed=2), randn(width, seed=3), randn(width, seed=4)
    g, y, c, b = g.to(dtype), y.to(dtype), c.to(dtype).index_fill(0, torch.tensor([2]), 0), b.to(dtype)
    g = {"contiguous": g, "transposed": g.T.contiguous().T, "expanded": g[:1].expand(n, width)}[layout]
    bias = b if with_bias else None
    assert does_one_pass(g, c, y, bias, scale=True)
    scaled, sums = in_one_pass(g, c, y, bias, scale=True)
    _, expected_scaled, expected_sums = in_chunks(g, c, y, bias, None, F.linear, True)
    assert torch.equal(scaled, expected_scaled)
    torch.testing.assert_close(sums, expected_sums)
    alone = in_one_pass(g, c, y, bias, scale=False)
    assert alone[0] is None
    torch.testing.assert_close(alone[1], expected_sums)


def test_one_pass_is_for_one_dtype_and_few_tokens():
    g, c = randn(4, 5).float(), randn(5).float()
    assert does_one_pass(g, c, g, None, scale=False)
    assert not does_one_pass(g.to(BF16), c, g.to(BF16), None, scale=True)
    assert not does_one_pass(g, c, g, c.to(BF16), scale=True)
    assert not does_one_pass(g[:0], c, g[:0], None, scale=True)
    long = g[:1].expand(CHUNK + 1, 5)
    assert not does_one_pass(long, c, long, None, scale=True)


@pytest.mark.parametrize("rank", [1, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("width", [7, 512])
def test_times_transposed(width, rank):
    thin, wide = randn(9, rank, seed=1), randn(9, width, seed=2)
    torch.testing.assert_close(times_transposed(thin, wide), thin.T @ wide)


def test_scale_and_sum_takes_no_more_than_a_chunk_at_once():
    """On a CPU no temporary is longer than CHUNK tokens, whatever their number."""
    n = 4 * CHUNK + 1
    g, y, weight = randn(n, 40).to(BF16), randn(n, 40).to(BF16), randn(40, 3).to(BF16)
    with Made() as made:
        parts.scale_and_sum(g, torch.ones(40), y, torch.ones(40), weight, F.linear, keep_scaled=False)
    given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in (g, y, weight)}
    largest = max(size for ref, size in made.storages.items() if ref.cdata not in given)
    assert largest <= CHUNK * 40 * 4
