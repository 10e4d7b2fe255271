"""Merging and combining against dense float64 matrices."""

import pytest
import torch

from dora_peft import reference
from dora_peft.ops import merging

S = 0.8


def factors(out, width, r, dtype=torch.float32):
    return torch.randn(r, width, dtype=dtype), torch.randn(out, r, dtype=dtype) / r**0.5


def adapter(weight, r, s, seed):
    """(A, B, m, s) as the reference takes it and (A, B, s, c) as functional does."""
    torch.manual_seed(seed)
    A, B = factors(*weight.shape, r, torch.float64)
    m = torch.rand(len(weight), dtype=torch.float64) + 0.5
    return (A, B, m, s), (A, B, s, m / reference.weight_norm(weight, A, B, s))


def test_merged_rows_compose_in_order():
    torch.manual_seed(0)
    weight = torch.randn(11, 8, dtype=torch.float64)
    (_, first), (_, second) = adapter(weight, 3, S, 1), adapter(weight, 2, -0.5, 2)
    A1, B1, s1, c1 = first
    A2, B2, s2, c2 = second
    expected = c2[:, None] * (c1[:, None] * (weight + s1 * B1 @ A1) + s2 * B2 @ A2)
    blocks = [merging.merged_rows(weight[i:j], i, j, [first, second]) for i, j in ((0, 4), (4, 11))]
    torch.testing.assert_close(torch.cat(blocks), expected)
    swapped = merging.merged_rows(weight, 0, 11, [second, first])
    assert not torch.allclose(swapped, expected)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.6, 0.3, 0.1], [1.0, -0.7, 2.0], [0.0, 0.0, 0.0]])
def test_combine_equals_the_dense_weighted_sum(weights):
    torch.manual_seed(0)
    weight = torch.randn(9, 13, dtype=torch.float64)
    dense, fast = zip(*(adapter(weight, r, s, r) for r, s in ((2, S), (3, 1.5), (1, -0.4))), strict=True)
    A, B, k = merging.weighted_sum(list(fast), weights)
    assert A.shape == (6, 13)
    assert B.shape == (9, 6)
    combined = reference.weighted_sum(weight, list(dense), weights)
    torch.testing.assert_close(k[:, None] * (weight + B @ A), combined)
    # as a DoRA adapter of scaling 1, whose magnitude is k times the norm
    m = k * reference.weight_norm(weight, A, B, 1.0)
    torch.testing.assert_close(reference.dora_weight(weight, A, B, m, 1.0), combined)


def test_combine_of_rows_whose_scale_vanishes():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64)
    A, B = factors(4, 6, 2, torch.float64)
    # weight -1 makes k exactly 0 in the first two rows
    c = torch.tensor([2.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    new_A, new_B, k = merging.weighted_sum([(A, B, S, c)], [-1.0])
    expected = weight - (c[:, None] * (weight + S * B @ A) - weight)
    torch.testing.assert_close(k[:, None] * (weight + new_B @ new_A), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("out", "width", "k", "rank"), [(9, 13, 6, 2), (9, 13, 6, 6), (13, 4, 6, 3), (3, 20, 8, 3)])
def test_truncate_is_the_best_approximation(out, width, k, rank):
    torch.manual_seed(0)
    A, B = factors(out, width, k, torch.float64)
    u, sigma, vh = torch.linalg.svd(B @ A, full_matrices=False)
    expected = u[:, :rank] * sigma[:rank] @ vh[:rank]
    low_A, low_B = merging.truncate(A, B, rank)
    assert low_A.shape == (rank, width)
    assert low_B.shape == (out, rank)
    torch.testing.assert_close(low_B @ low_A, expected)


def test_truncate_beyond_the_layer_is_exact():
    torch.manual_seed(0)
    A, B = factors(3, 20, 8, torch.float64)
    low_A, low_B = merging.truncate(A, B, 7)
    assert len(low_A) <= 7
    torch.testing.assert_close(low_B @ low_A, B @ A)


def test_rows_and_factors_together_are_the_merged_rows():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = random(7, 5)
    adapters = [
        (random(rank, 5), random(7, rank), scaling, random(7)) for rank, scaling in ((2, 0.5), (3, 2.0), (1, 1.0))
    ]
    scale, lora_A, lora_B = merging.rows_and_factors(adapters)
    assert (lora_A.shape, lora_B.shape) == ((6, 5), (7, 6))
    merged = merging.merged_rows(weight, 0, 7, adapters)
    torch.testing.assert_close(scale[:, None] * weight + lora_B @ lora_A, merged)
