"""Layers that are copied, replicated and cast."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_fixtures import (
    KINDS,
    One,
    adapted,
    base_of,
    check,
    dora,
    example,
    perturb,
)
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig


# Triton's interpreter runs in one thread
@pytest.mark.implementation("torch")
def test_replicas_of_data_parallel_compute_apart():
    """nn.DataParallel runs a replica of the layer in each thread; here both on the CPU."""
    model = get_peft_model(One(nn.Linear(12, 10)), DoraConfig(r=3, target_modules=["layer"]))
    layer = dora(model)
    perturb(layer, "default")
    xs = [torch.randn(4, 12), torch.randn(4, 12)]
    expected = [layer(x) for x in xs]
    replicas = [layer._replicate_for_data_parallel() for _ in xs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda replica, x: replica(x), replicas, xs))
    for y, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(y, correct)
    norms = [one._norms["default"] for one in (layer, *replicas)]
    assert len({norm.known.value.data_ptr() for norm in norms}) == 3
    sum(y.sum() for y in found).backward()
    assert layer.lora_magnitude_vector["default"].weight.grad is not None


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_lowering_the_dtype_keeps_the_magnitude_in_fp32(kind, cast):
    model = adapted(kind)
    magnitude = dora(model).lora_magnitude_vector["default"].weight
    before = magnitude.detach().clone()
    cast(model)
    after = dora(model).lora_magnitude_vector["default"].weight
    assert after is magnitude
    assert after.dtype == torch.float32
    assert torch.equal(after, before)
    assert dora(model).factor_parameters("default")[0].dtype in (torch.float16, torch.bfloat16)
    check(model, example(model))
    model.double()
    assert dora(model).lora_magnitude_vector["default"].weight.dtype == torch.float64
    check(model, example(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_file])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind, duplicate):
    model = adapted(kind, torch.float64)
    x = example(model)
    expected = model(x).detach()
    twin = duplicate(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    check(twin, x)
    assert torch.equal(model(x), expected)


def test_a_copy_of_a_merged_model_unmerges():
    model = adapted("linear")
    content = base_of(model).weight.detach().clone()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(base_of(twin).weight, content)
    assert dora(model).merged
