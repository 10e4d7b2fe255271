"""Layers of every kind are merged, unmerged and unloaded."""

import copy

import pytest
import torch
from layer_fixtures import (
    DTYPES,
    FLOOR,
    MERGEABLE,
    Truth,
    adapted,
    base_of,
    dense_base,
    distance,
    dora,
    example,
    with_two_adapters,
)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_several_adapters_merge_as_they_run(kind):
    model = with_two_adapters(kind)
    x = example(model)
    model.base_model.set_adapter(["second", "default"])
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_merging_one_after_the_other_equals_merging_both():
    model = with_two_adapters("linear")
    x = example(model)
    model.base_model.set_adapter(["default", "second"])
    expected = model(x)
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="were merged default.*additionally merging second"):
        model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MERGEABLE)
def test_merging(kind, dtype):
    model = adapted(kind, dtype)
    x = example(model)
    truth = Truth(model, x)
    before = base_of(model).weight
    content = before.detach().clone()
    model.merge_adapter()
    merged = base_of(model).weight
    assert (merged.dtype, merged.shape, merged.requires_grad) == (dtype, content.shape, False)
    # one rounding, that of the result; float64 norms hold fp32 magnitudes
    floor = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0)
    rounded = truth.matrix.to(dtype).double()
    assert distance(dense_base(base_of(model), merged.double()), truth.matrix) <= (
        1.1 * distance(rounded, truth.matrix) + floor
    )
    naive = Truth(model, x, dtype=dtype)
    assert distance(model(x), truth.y) <= 2 * distance(naive.y, truth.y) + FLOOR[dtype]
    model.unmerge_adapter()
    assert base_of(model).weight is before
    assert torch.equal(before, content)


def test_unmerging_follows_a_move_in_between():
    model = adapted("linear")
    content = base_of(model).weight.detach().clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert torch.equal(base_of(model).weight, content.double())


def test_merging_with_the_original_offloaded():
    model = adapted("linear")
    x, content = example(model), base_of(model).weight.detach().clone()
    expected = model(x)
    model.base_model.merge_adapter(offload_original=True)
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(base_of(model).weight, content)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", MERGEABLE)
def test_safe_merge_refuses_what_is_not_finite(kind, value):
    model = adapted(kind)
    with torch.no_grad():
        dora(model).lora_magnitude_vector["default"].weight.view(-1)[3] = value
    before, content = base_of(model).weight, base_of(model).weight.clone()
    with pytest.raises(ValueError, match=r"default.*module 'layer'"):
        model.merge_adapter(safe_merge=True)
    assert base_of(model).weight is before
    assert torch.equal(before, content)
    assert not dora(model).merged
    assert dora(model)._original is None


@pytest.mark.parametrize("kind", MERGEABLE)
def test_delta_weight_is_the_change_of_the_weight(kind):
    model = adapted(kind, torch.float64)
    delta = dora(model).get_delta_weight("default")
    before = base_of(model).weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(dora(model).get_delta_weight("default"), delta)
    torch.testing.assert_close(before + delta, base_of(model).weight)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_unloading(kind):
    model = adapted(kind)
    x, base = example(model), copy.deepcopy(base_of(model))
    expected = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.layer) is type(base)
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.unload()(x), base(x))
