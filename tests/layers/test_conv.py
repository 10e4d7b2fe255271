"""What is special in convolutions; what all kinds of layers share is in test_layer.py."""

import pytest
import torch
import torch.nn.functional as F
from layer_fixtures import KINDS, MERGEABLE, One, Truth, adapted, base_of, dora, example
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "conv2d-grouped"])
def test_convolutions_without_a_batch_dimension(kind):
    model = adapted(kind)
    x = example(model, batch=1)
    torch.testing.assert_close(model(x[0]), model(x)[0])


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_modes(mode):
    model = adapted(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
    x = example(model)
    base, layer = base_of(model), dora(model)
    lora_A, lora_B = layer.factor_parameters("default")
    change = layer.scaling["default"] * (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(base.weight)
    m = layer.lora_magnitude_vector["default"].weight
    c = m / (base.weight + change).flatten(1).norm(dim=1).view_as(m)
    b = base.bias.view(-1, 1, 1)
    # the base pads in its own way, the low-rank branch with zeros, as PEFT's does
    torch.testing.assert_close(model(x), c * (base(x) - b + F.conv2d(x, change, padding=1)) + b)


@pytest.mark.parametrize("mode", ["branch", "paper"])
def test_dropout_of_a_convolution(mode):
    model = adapted("conv2d", torch.float64, lora_dropout=0.5, dropout_mode=mode)
    layer, base, x = dora(model), base_of(model), example(model)
    truth = Truth(model, x)
    lora_A, lora_B = layer.factor_parameters("default")
    change = layer.scaling["default"] * (lora_B.flatten(1) @ lora_A.flatten(1))
    c = truth.matrix.norm(dim=1) / (base.weight.flatten(1) + change).norm(dim=1)

    def conv(x, matrix):
        return F.conv2d(x, matrix.view_as(base.weight), None, base.stride, base.padding)

    c, b = c.view(-1, 1, 1), base.bias.view(-1, 1, 1)
    torch.manual_seed(5)
    found = model(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    if mode == "branch":
        expected = c * (conv(x, base.weight) + conv(dropped, change)) + b
    else:
        expected = conv(x, base.weight) + (c - 1) * conv(dropped, base.weight) + c * conv(dropped, change) + b
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["conv2d", "conv2d-pointwise"])
def test_merging_a_channels_last_convolution(kind):
    model = adapted(kind, torch.float64).to(memory_format=torch.channels_last)
    x = example(model)
    expected = Truth(model, x)
    torch.testing.assert_close(model(x), expected.y)
    model.merge_adapter()
    torch.testing.assert_close(base_of(model).weight.flatten(1), expected.matrix)
    torch.testing.assert_close(model(x), expected.y)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MERGEABLE])
def test_grouped_convolutions_are_not_merged(kind):
    model = adapted(kind)
    before = base_of(model).weight.clone()
    with pytest.raises(NotImplementedError, match=r"module 'layer'.*groups"):
        model.merge_adapter()
    assert torch.equal(base_of(model).weight, before)
    assert not dora(model).merged
    with pytest.raises(NotImplementedError, match=r"module 'layer'.*groups"):
        dora(model).get_delta_weight("default")


def test_convolutions_that_pad_otherwise_are_not_merged():
    model = adapted(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(NotImplementedError, match=r"module 'layer'.*'reflect'"):
        model.merge_adapter()


def test_a_rank_that_the_groups_do_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match=r"groups=2 and rank 3.*module 'layer'"):
        get_peft_model(One(KINDS["conv2d-grouped"]()), DoraConfig(r=3, target_modules=["layer"]))
