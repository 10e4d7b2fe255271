"""A sample of an output finds every change of the bits that it copied, and no other."""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP32, randn

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels.sample import compare_sample, take_sample

# of a [6, 8] output: elements 16 to 31, and 7 elements from the third on, each 6 apart
OFFSET, START, STEP, SIZE, COUNT = 16, 2, 6, 16, 7
PLACES = {*range(OFFSET, OFFSET + SIZE), *range(START, START + COUNT * STEP, STEP)}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_sample_holds_the_elements_that_it_names(dtype):
    y = randn(6, 8, dtype=dtype)
    rows, diagonal = take_sample(y, OFFSET, START, STEP, SIZE, COUNT)
    assert torch.equal(rows, y.view(-1)[OFFSET : OFFSET + SIZE])
    assert torch.equal(diagonal, y.view(-1)[START : START + COUNT * STEP : STEP])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_it_finds_a_change_of_what_it_copied_and_of_nothing_else(dtype):
    y = randn(6, 8, dtype=dtype)
    kept = take_sample(y, OFFSET, START, STEP, SIZE, COUNT)
    assert not compare_sample(y, *kept, OFFSET, START, STEP)
    for place in range(y.numel()):
        changed = y.clone()
        changed.view(-1)[place] *= 2
        assert bool(compare_sample(changed, *kept, OFFSET, START, STEP)) == (place in PLACES), place


def test_not_a_number_equals_itself():
    y = torch.full((6, 8), torch.nan, device=DEVICE)
    kept = take_sample(y, OFFSET, START, STEP, SIZE, COUNT)
    assert not compare_sample(y, *kept, OFFSET, START, STEP)


def test_an_output_without_elements():
    y = randn(0, 8)
    rows, diagonal = take_sample(y, 0, 0, 1, 0, 0)
    assert rows.shape == diagonal.shape == (0,)
    assert not compare_sample(y, rows, diagonal, 0, 0, 1)
