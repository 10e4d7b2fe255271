"""The oracle itself: by hand, by finite differences, by the equations of the backward pass, and by plain PEFT."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import SHAPES, ConfigSpec, ModelSpec, base, example, scaling, targets
from oracle import Adapter, Layer, apply, apply_branches, combined, compose, evaluate
from peft import LoraConfig, get_peft_model
from torch import nn
from world import World

# PEFT says that they cannot be merged
pytestmark = pytest.mark.filterwarnings("ignore:.*groups > 1:UserWarning")
DOUBLE = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=DOUBLE)


def adapter(A, B, m, s=1.0, *, tied=None, **options):
    tied = torch.zeros(len(m), dtype=torch.bool) if tied is None else torch.tensor(tied)
    return Adapter(A, B, torch.tensor(m, dtype=DOUBLE), s, tied, **options)


def drawn(kind="linear", *, detach=True, tied=(False, False, False), seed=0):
    """A layer of three rows and four inputs with two adapters."""
    random = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=random, dtype=DOUBLE)

    weight = normal(3, 4)
    weight[torch.tensor(tied)] = 0
    made = {
        name: adapter(normal(2, 4), normal(3, 2), normal(3).tolist(), 0.7, tied=tied, detach=detach) for name in "pq"
    }
    return Layer(kind, weight, normal(3), made), normal(5, 4)


def test_a_row_keeps_its_direction_and_takes_its_length_from_m():
    layer = Layer("linear", tensor([3, 4]), None, {"p": adapter(tensor([1, 0]), tensor([0]), [10])})
    torch.testing.assert_close(compose(layer), tensor([6, 8]))


def test_the_change_is_scaled_before_the_norm_is_taken():
    layer = Layer("linear", tensor([3, 4]), None, {"p": adapter(tensor([1, 0]), tensor([2]), [1], 0.5)})
    torch.testing.assert_close(compose(layer), tensor([4, 4]) / math.sqrt(32))


def test_several_adapters_compose_in_order_each_with_the_norm_of_its_own_change():
    # W0 + d1 = [4, 0], c1 = 2
    first = adapter(tensor([1, 0]), tensor([1]), [8])
    # W0 + d2 = [3, 4], c2 = 3
    second = adapter(tensor([0, 1]), tensor([4]), [15])
    layer = Layer("linear", tensor([3, 0]), None, {"p": first, "q": second})
    # 3 (2 [4, 0] + [0, 4])
    torch.testing.assert_close(compose(layer), tensor([24, 12]))
    layer.adapters = {"q": second, "p": first}
    # 2 (3 [3, 4] + [1, 0])
    torch.testing.assert_close(compose(layer), tensor([20, 24]))


def test_a_tied_row_trains_as_plain_lora():
    layer = Layer("linear", tensor([0, 0]), None, {"p": adapter(tensor([1, 2]), tensor([3]), [5], tied=[True])})
    torch.testing.assert_close(compose(layer), tensor([3, 6]))
    x = tensor([1, 1])
    y, gradients = evaluate({"a": layer}, x, lambda x, call: call("a", x), torch.ones(1, 1), DOUBLE)
    assert y.item() == 9
    assert gradients["a.p.m"].item() == 0
    assert gradients["a.p.B"].item() == 3


def test_a_tied_row_whose_norm_is_zero_has_finite_gradients():
    zero = adapter(tensor([1, 2]), tensor([0]), [0], tied=[True], detach=False)
    layer = Layer("linear", tensor([0, 0]), None, {"p": zero})
    _, gradients = evaluate({"a": layer}, tensor([1, 1]), lambda x, call: call("a", x), torch.ones(1, 1), DOUBLE)
    assert gradients["a.p.B"].item() == 3


def test_the_magnitude_alone():
    layer = Layer("linear", tensor([3, 4]), tensor([1])[0], {"p": adapter(None, None, [10])})
    x = tensor([1, 1])
    y, gradients = evaluate({"a": layer}, x, lambda x, call: call("a", x), torch.ones(1, 1), DOUBLE)
    # the bias is not scaled
    assert y.item() == 15
    assert gradients["a.p.m"].item() == pytest.approx(7 / 5)
    assert set(gradients) == {"x", "a.p.m"}


def test_a_weighted_sum():
    layer = Layer("linear", tensor([3, 4]), None, {"p": adapter(tensor([1, 0]), tensor([0]), [10])})
    torch.testing.assert_close(combined(layer, [0.5]), tensor([4.5, 6]))


@pytest.mark.parametrize("tied", [(False, False, False), (False, True, False)])
def test_the_full_gradient_by_finite_differences(tied):
    layer, x = drawn(detach=False, tied=tied)
    leaves = [t.requires_grad_() for a in layer.adapters.values() for t in (a.lora_A, a.lora_B, a.magnitude)]
    assert torch.autograd.gradcheck(lambda *_: apply(layer, x), leaves)


def test_the_detached_gradient_by_its_equations():
    layer, x = drawn()
    layer.adapters.pop("q")
    one, probe = layer.adapters["p"], torch.randn(5, 3, dtype=DOUBLE)
    y, gradients = evaluate({"a": layer}, x, lambda x, call: call("a", x), probe, DOUBLE)
    A, B, m, s = one.lora_A, one.lora_B, one.magnitude, one.scaling
    scaled = probe * m / (layer.weight + s * B @ A).norm(dim=1)
    expected = {
        "a.p.B": s * scaled.T @ (x @ A.T),
        "a.p.A": (s * scaled @ B).T @ x,
        "a.p.m": (probe * (y - layer.bias)).sum(0) / m,
        "x": scaled @ (layer.weight + s * B @ A),
    }
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value)


def test_the_detached_and_the_full_gradient_differ():
    by_detach = []
    for detach in (True, False):
        layer, x = drawn(detach=detach)
        by_detach.append(evaluate({"a": layer}, x, lambda x, call: call("a", x), torch.ones(5, 3), DOUBLE)[1])
    assert not torch.allclose(by_detach[0]["a.p.B"], by_detach[1]["a.p.B"], rtol=0.01)
    torch.testing.assert_close(by_detach[0]["x"], by_detach[1]["x"])


def world_of(shape, **options):
    world = World(ModelSpec(shape, "float64", "small", tokens=4), ConfigSpec(**options))
    world.start()
    return world


@pytest.mark.parametrize("shape", SHAPES)
def test_without_adapters_it_is_the_base_model(shape):
    world, net = world_of(shape), base(ModelSpec(shape, "float64", "small", tokens=4))
    world.disabled = True
    layers = world.layers()
    for name in SHAPES[shape].layers:
        module = getattr(net, name)
        if isinstance(module, nn.Embedding):
            x = torch.arange(4)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            x = torch.randn(2, module.in_channels, *[6] * len(module.kernel_size), dtype=DOUBLE)
        else:
            x = torch.randn(2, oracle.as_matrix(layers[name]).shape[1], dtype=DOUBLE)
        torch.testing.assert_close(apply(layers[name], x), module(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("detach", [True, False])
def test_composed_weights_and_branches_agree(shape, detach):
    world = world_of(shape, detach_norm=detach)
    x = example(world.spec, DOUBLE, 0)
    results = []
    for how in (apply, apply_branches):
        run = lambda x, call: torch.tanh(call(SHAPES[shape].layers[0], x))  # noqa: E731
        probe = torch.ones((), dtype=DOUBLE)
        y = run(x, lambda name, value: apply(world.layers()[name], value))
        results.append(evaluate(world.layers(), x, run, probe.expand(y.shape), DOUBLE, how))
    torch.testing.assert_close(results[0], results[1])


def test_a_grouped_convolution_is_a_full_one_with_zeros():
    world = world_of("grouped")
    (one,) = world.layers()["a"].adapters.values()
    layer = replace(world.layers()["a"], adapters={"p": one})
    x = torch.randn(2, 4, 6, dtype=DOUBLE)
    u = F.conv1d(x, one.lora_A, padding=1)
    plain = F.conv1d(x, layer.weight, padding=1, groups=2) + one.scaling * F.conv1d(u, one.lora_B, groups=2)
    c = oracle.scale(layer, one)
    torch.testing.assert_close(apply(layer, x), c[:, None] * plain + layer.bias[:, None])


@pytest.mark.parametrize("shape", ["one", "glu", "chain", "embedding", "conv1d", "conv2d"])
def test_plain_peft_computes_the_same(shape):
    """PEFT's own use_dora is the same function, by code of others."""
    spec, config = ModelSpec(shape, "float64", "small", tokens=4), ConfigSpec()
    world = World(spec, config)
    options = {"r": config.r, "lora_alpha": config.alpha, "target_modules": targets(config, spec)[0]}
    world.model = get_peft_model(base(spec), LoraConfig(use_dora=True, **options))
    for name in SHAPES[spec.shape].layers:
        layer = getattr(world.net, name)
        world.weights[name], world.biases[name] = layer.base_layer.weight, getattr(layer.base_layer, "bias", None)
    world.note("default", config)
    x = world.input()
    y, run = world.forward(x)
    world.step_loss([y], [run])
    world.compare([y], [run], [x], "plain PEFT")


def test_scaling():
    assert scaling(ConfigSpec(r=2, alpha=3)) == 1.5
    assert scaling(ConfigSpec(r=4, alpha=3, rslora=True)) == 1.5
