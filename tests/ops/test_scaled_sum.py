"""c * (z - b) + s u B^T + b by torch's operations."""

import pytest
import torch
from linear_fixtures import BF16, FLOOR, FP16, FP32, FP64, LENGTHS, distance, randn

from dora_peft.ops.scaled_sum import scaled_sum

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_sum(with_bias, dtype, n):
    """Into z itself and elsewhere; in low precision with no rounding but that of the result."""
    wide = FP64 if dtype is FP64 else FP32
    z, u = randn(n, 7, seed=1).to(dtype), randn(n, 3, seed=2).to(dtype)
    c, b = randn(7, seed=3).to(wide), randn(7, seed=4).to(dtype) if with_bias else None
    folded = randn(7, 3, seed=5).to(wide)
    shift = b.double() if with_bias else 0
    expected = c.double() * (z.double() - shift) + u.double() @ folded.double().T + shift
    kept, out = z.clone(), torch.empty_like(z)
    assert scaled_sum(z, u, folded, c, b, out=out) is out
    assert torch.equal(z, kept)
    assert scaled_sum(z, u, folded, c, b, out=z) is z
    assert torch.equal(z, out)
    rounded = distance(expected.to(dtype), expected)
    assert distance(out, expected) <= (1.01 * rounded + 1e-6 if wide is FP32 else FLOOR[FP64])
