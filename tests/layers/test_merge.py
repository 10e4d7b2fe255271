"""A merged weight is W' in the dtype or quantisation of the base; unmerging restores the original bit for bit."""

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
from quantised_fixtures import quantised, stored


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


def test_a_copy_of_a_merged_model_unmerges():
    model = adapted("linear")
    content = base_of(model).weight.detach().clone()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(base_of(twin).weight, content)
    assert dora(model).merged


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("used", [False, True])
def test_quantised_bases_unmerge_bit_for_bit(bits, used):
    model = quantised(bits).train()
    x = torch.randn(3, 64, requires_grad=True)
    if used:
        model(x)
    before = stored(base_of(model))
    output = model(x)
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(stored(base_of(model))["data"], before["data"])
        merged = model(x)
        # the merged weight is quantised again
        assert distance(merged.detach(), output.detach().double()) < (0.2 if bits == 4 else 0.03)
        model.unmerge_adapter()
        after = stored(base_of(model))
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert torch.equal(model(x), output)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_safe_merge(bits):
    model = quantised(bits)
    x = torch.randn(3, 64)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    with torch.no_grad():
        dora(model).lora_magnitude_vector["default"].weight[3] = float("nan")
    before = stored(base_of(model))
    with pytest.raises(ValueError, match=r"module 'layer'"):
        model.merge_adapter(safe_merge=True)
    assert not dora(model).merged
    after = stored(base_of(model))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model(x)[:, :3].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_offloading_the_original_leaves_a_quantised_one_where_it_is(bits):
    model = quantised(bits)
    original = base_of(model).weight
    address = original.data_ptr()
    model.base_model.merge_adapter(offload_original=True)
    assert dora(model)._original == (original,)
    assert original.data_ptr() == address
    model.unmerge_adapter()
    assert base_of(model).weight is original
