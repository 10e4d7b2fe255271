"""Float weights are written in their own layout; those of grouped convolutions are not."""

import pytest
import torch
from base_fixtures import ALL, DENSE, GROUPED, build
from torch import nn

from dora_peft.bases import base_weight


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", DENSE)
def test_replacement_writes_the_rows_that_it_is_given(kind):
    layer, matrix = build(kind)
    weight = base_weight(layer, "layer")
    factor = torch.arange(1.0, len(matrix) + 1, dtype=weight.dtype)[:, None]
    new = weight.replacement(lambda rows, start, stop: 2 * factor[start:stop] * rows)
    assert isinstance(new, nn.Parameter)
    assert not new.requires_grad
    assert (new.dtype, new.shape, new.stride()) == (layer.weight.dtype, layer.weight.shape, layer.weight.stride())
    assert new.data_ptr() != layer.weight.data_ptr()
    layer.weight = new
    expected = (2 * factor.double() * matrix).to(new.dtype).double()
    torch.testing.assert_close(ALL[kind][1](layer), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", GROUPED)
def test_grouped_and_opaque_weights_say_that_they_cannot_be_replaced(kind):
    layer, _ = build(kind)
    assert not base_weight(layer, "layer").mergeable


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_a_kept_original_comes_back_in_the_dtype_of_the_installed_weight(kind, offload):
    layer, matrix = build(kind)
    original = layer.weight
    weight = base_weight(layer, "layer")
    assert weight.keep_original(layer, offload) is original
    new = weight.replacement(lambda rows, start, stop: 0 * rows)
    weight.install(layer, new)
    assert layer.weight is new
    layer.double()
    base_weight(layer, "layer", original).restore(layer, original)
    assert layer.weight is original
    assert original.dtype == torch.float64
    assert torch.equal(ALL[kind][1](layer), matrix)
