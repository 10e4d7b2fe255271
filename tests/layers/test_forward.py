"""What a layer's output is made from: when W0 is multiplied by directly, and what is refused in between."""

import pytest
import torch
from layer_fixtures import Truth, distance, dora, example
from layer_fixtures import adapted as model_of
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_peft
from dora_peft import DoraConfig
from dora_peft.layers import forward


class Other(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def adapted(base, **options):
    model = get_peft_model(nn.Sequential(base), DoraConfig(r=2, target_modules=["0"], **options))
    return model.base_model.model[0]


@pytest.mark.parametrize("base", [nn.Linear(5, 4), Conv1D(4, 5)], ids=["Linear", "Conv1D"])
def test_a_plain_layer_is_multiplied_by_its_weight(base):
    weight = forward.dense_weight(adapted(base))
    assert weight.shape == (4, 5)
    assert weight.data_ptr() == base.weight.data_ptr()


def hooked(base):
    base.register_forward_hook(lambda *_: None)
    return base


def instance_forward(base):
    base.forward = base.forward
    return base


@pytest.mark.parametrize(
    "base",
    [hooked(nn.Linear(5, 4)), instance_forward(nn.Linear(5, 4)), Other(5, 4)],
    ids=["hook", "forward of its own", "subclass"],
)
def test_a_layer_that_computes_otherwise_is_called(base):
    layer = adapted(base)
    assert forward.dense_weight(layer) is None
    x = torch.randn(3, 5)
    z, dtype = forward.base_product(layer, x, (), {})
    assert dtype is torch.float32
    torch.testing.assert_close(z, base(x) - base.bias)


def test_a_trained_weight_is_not_multiplied_by():
    layer = adapted(nn.Linear(5, 4))
    layer.get_base_layer().weight.requires_grad_()
    assert forward.dense_weight(layer) is None


@pytest.mark.parametrize(
    ("base", "differs"), [(nn.Linear(5, 4), False), (hooked(nn.Linear(5, 4)), True), (Other(5, 4), True)]
)
def test_what_may_differ_the_second_time(base, differs):
    assert forward.may_differ_again(adapted(base)) is differs


def test_dropout_counts_in_training_alone():
    layer = adapted(nn.Linear(5, 4), lora_dropout=0.25, dropout_mode="paper")
    layer.train()
    assert forward.dropout_probability(layer, "default") == 0.25
    assert forward.drops_base(layer, "default")
    layer.eval()
    assert forward.dropout_probability(layer, "default") == 0
    assert not forward.drops_base(layer, "default")


@pytest.mark.parametrize("base", [nn.Conv2d(3, 4, 2), nn.Linear(3, 4)], ids=["Conv2d", "Linear"])
def test_a_bias_broadcasts_against_the_output(base):
    layer = adapted(base)
    x = torch.randn(2, 3, 5, 5) if isinstance(base, nn.Conv2d) else torch.randn(2, 3)
    z, _ = forward.base_product(layer, x, (), {})
    torch.testing.assert_close(z + forward.bias_of(layer), base(x), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_written_before_backward_is_named():
    """Of a convolution, which computes its product again: here since y was written over."""
    layer = adapted(nn.Conv2d(3, 4, 2))
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = layer(x)
    y.data.zero_()
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(2)
    with pytest.raises(RuntimeError, match="base weight of module '0' was changed"):
        y.sum().backward()


@pytest.mark.implementation("torch")
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_differentiating_twice_is_refused_but_by_the_reference(kind):
    model = model_of(kind, torch.float64).double()
    layer, x = dora(model), example(model)

    def second(y, A, m):
        (first,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
        return torch.autograd.grad(first.square().sum(), m)[0]

    own = layer.factor_parameters("default")[0], layer.magnitude("default")
    with pytest.raises(RuntimeError, match=r'create_graph=True.*implementation\("reference"\)'):
        second(model(x), *own)
    with dora_peft.implementation("reference"):
        found = second(model(x), *own)
    truth = Truth(model, x)
    A, _, m = truth.parameters["default"]
    assert distance(found, second(truth.y, A, m)) < 1e-10
