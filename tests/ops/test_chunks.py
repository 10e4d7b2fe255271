"""One pass over a gradient: by one operation, and a few tokens at a time."""

import pytest
import torch
import torch.nn.functional as F
from linear_fixtures import BF16, FP32, FP64, randn

from dora_peft.ops.chunks import CHUNK, LANES, chunk, does_one_pass, in_chunks, in_one_pass

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_a_chunk_is_an_equal_part(length):
    size = chunk(length, torch.device("cpu"))
    parts = -(-length // size)
    assert size <= CHUNK
    assert parts == -(-length // CHUNK)
    assert size * parts - length < parts
    assert chunk(length, torch.device("cuda")) == length


def test_chunks_of_lanes_and_of_tokens_add_up():
    """More tokens than a chunk, and wide enough that sums run in several lanes of a chunk."""
    width = LANES // 300
    g, y, c = randn(CHUNK + 7, width, seed=1).float(), randn(CHUNK + 7, width, seed=2).float(), randn(width).float()
    weight = randn(width, 3, seed=3).float()
    product, scaled, sums = in_chunks(g, c, y, None, weight, F.linear, True)
    torch.testing.assert_close(scaled, g * c)
    torch.testing.assert_close(product, (g * c) @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums.double(), (g.double() * y.double()).sum(0), rtol=1e-4, atol=1e-3)
