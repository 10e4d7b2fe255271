"""What the products of the kernels are worth, by arithmetic alone: no GPU multiplies here."""

import platform

import pytest
import torch
from kernel_fixtures import BF16, FP16, FP32, ROUNDING

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels.tuning import Choice, fitting, ranks_at_once


def rounded(x):
    """fp32 to the 10 bits of tf32, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(FP32)


def three_products(left, right):
    """What `tl.dot` does as "tf32x3"; a product of two tf32 numbers is exact in fp32."""
    large = [rounded(left), rounded(right)]
    small = [rounded(left - large[0]), rounded(right - large[1])]
    return (small[0] @ large[1] + large[0] @ small[1]) + large[0] @ large[1]


@pytest.mark.parametrize("terms", [16, 384, 4096])
def test_three_tf32_products_are_as_exact_as_the_tests_of_the_kernels_ask(terms):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in [(64, terms), (terms, 64)])
    truth = left.double() @ right.double()

    def error(found):
        return ((found.double() - truth).norm() / truth.norm()).item()

    exact, one = error(three_products(left, right)), error(rounded(left) @ rounded(right))
    # as fp32 itself, whose sum over the terms is rounded as often; half of what the kernels' tests allow is left
    assert exact < 2 * error(left @ right)
    assert exact < ROUNDING[FP32] / 2
    # one product alone is far from it
    assert one > 100 * ROUNDING[FP32]


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 384])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_product_takes_ranks_enough_for_the_matrix_units_and_few_enough_for_the_registers(dtype, rank):
    taken = ranks_at_once(rank, dtype)
    assert 16 <= taken <= (32 if dtype is FP32 else 64)
    assert taken & (taken - 1) == 0


def test_a_configuration_is_tried_where_it_fits():
    small, large = (Choice({}, num_warps=4, num_stages=2, shared_kib=size) for size in (0, 192))
    assert fitting([small, large], 227) == [small, large]
    assert fitting([small, large], 163) == [small]
