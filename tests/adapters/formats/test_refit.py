"""A norm per output row that comes near one per input column."""

from dataclasses import replace

import pytest
import torch
from format_fixtures import base_for, effective, module

from dora_peft.adapters.formats import Adapter, Base
from dora_peft.adapters.formats.refit import refitted


def target_of(weight, one, scale):
    """W' with a norm per input column, restated."""
    composed = weight.double() + one.scaling * one.matrices()[1].double() @ one.matrices()[0].double()
    kernel = composed.view(len(composed), scale.numel(), -1)
    return (kernel * (scale.double() / kernel.norm(dim=(0, 2)))[:, None]).flatten(1)


def fitted(rank, kernel=(), zero=False):
    one = replace(module(9, 6, rank, 2.0, kernel=kernel), magnitude=None)
    model = base_for(Adapter({"a": one}))
    if zero:
        one.lora_B[2] = 0
        with torch.no_grad():
            model.a.weight[2] = 0
    weight = Base(model).weight("a", one)
    scale = 1 + torch.rand(6, generator=torch.Generator().manual_seed(3))
    found, error = refitted(weight, one, scale)
    return found, error, target_of(weight.dense(), one, scale), weight.dense()


@pytest.mark.parametrize("kernel", [(), (3,)])
def test_the_error_is_that_of_the_result(kernel):
    found, error, target, weight = fitted(2, kernel)
    made = effective(weight, found)
    expected = (made - target).norm() / (target - weight).norm()
    assert error == pytest.approx(expected.item(), rel=1e-4)
    assert 0.01 < error < 0.9
    assert found.lora_A.shape[1:] == (6, *kernel)


def test_more_ranks_come_nearer_and_all_of_them_there():
    errors = [fitted(rank)[1] for rank in (1, 3, 6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_rows_of_zeros_stay_zero():
    found, error, *_ = fitted(6, zero=True)
    assert error < 1e-5
    assert found.magnitude[2] < 1e-12
    assert torch.isfinite(found.lora_B).all()
