"""Masks and parametrizations on A, B and m: what is computed from them, whatever runs the layer."""

import pytest
import torch
from called_fixtures import (
    ALL_KINDS,
    COMPUTED,
    ablate,
    attach,
    check_computed,
    holders,
    in_float64,
    leaves,
    leaves_of,
    recorded,
    takes_fast_road,
)
from layer_fixtures import check, distance, dora, example
from quantised_fixtures import quantised
from torch import nn

import dora_peft


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_computed_weight_has_the_gradients_of_the_reference(kind, how, detach):
    model = in_float64(kind, detach_norm=detach)
    attach(dora(model), how)
    x = example(model)
    assert not takes_fast_road(model, x)
    check_computed(model, x, detach=detach)


@pytest.mark.parametrize("symbol", "ABm")
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_one_computed_weight_is_enough(kind, symbol):
    model = in_float64(kind)
    x = example(model)
    before = model(x)
    for _ in range(2):
        model(x)
    attach(dora(model), "parametrization", symbol)
    assert distance(check_computed(model, x), before.detach()) > 1e-3


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_training_before_with_and_after(kind, how):
    """v and the products follow each step; the mask is applied to what the optimizer has written."""
    model = in_float64(kind)
    layer, x = dora(model), example(model)

    def steps():
        for _ in range(2):
            optimizer = torch.optim.SGD(leaves(layer).values(), lr=0.05)
            optimizer.zero_grad()
            check_computed(model, x).square().sum().backward()
            before = {n: p.detach().clone() for n, p in leaves(layer).items()}
            optimizer.step()
            assert any(not torch.equal(p, before[n]) for n, p in leaves(layer).items())

    steps()
    assert takes_fast_road(model, x)
    detach = attach(layer, how, "ABm")
    steps()
    assert not takes_fast_road(model, x)
    after = model(x)
    detach()
    assert takes_fast_road(model, x)
    assert distance(model(x), after.detach()) < 1e-12
    check(model, x)


def test_evaluation_follows_a_mask():
    model = in_float64("linear").eval()
    x = example(model, grad=False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(x), model(x)
            before = model(x)
        detach = attach(dora(model), "mask")
        with context():
            masked = [model(x) for _ in range(2)]
        assert torch.equal(*masked)
        assert distance(masked[0], before) > 1e-3
        assert distance(masked[0], check_computed(model, x.clone().requires_grad_()).detach()) < 1e-12
        detach()


def test_spectral_norm_iterates_once_a_pass():
    """v is that of the very weight that the product used, which no two calls have alike while it iterates."""
    model = in_float64("linear").train()
    layer, x, used = dora(model), example(model), {}
    for symbol, (holder, name) in list(holders(layer).items())[:2]:
        nn.utils.parametrizations.spectral_norm(holder, name)
        holder.register_forward_hook(lambda module, args, out, s=symbol: used.update({s: module.weight.detach()}))
    weight, m = layer.get_base_layer().weight, layer.magnitude("default")
    for _ in range(3):
        y = model(x)
        s = layer.scaling["default"]
        assert not torch.equal(layer.lora_A["default"].weight, used["A"]) or _ > 0
        want = dora_peft.reference.dora_linear(x, weight, used["A"], used["B"], m, s, layer.get_base_layer().bias)
        assert distance(y, want.detach()) < 1e-12


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(bits):
    model = quantised(bits).train()
    x = torch.randn(5, 64, requires_grad=True)
    wanted = leaves_of(model)
    plain = torch.autograd.grad((before := model(x)).square().sum(), [x, *wanted])
    seen = recorded(model, ("lora_A", "lora_B"))
    found = torch.autograd.grad((after := model(x)).square().sum(), [x, *wanted])
    assert len(seen) == 2
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for got, want in zip(found, plain, strict=True):
        assert distance(got, want.double()) < 1e-4
    attach(dora(model), "mask")
    masked = model(x)
    assert distance(masked, before.detach().double()) > 1e-3
    masked.sum().backward()
    assert dora(model).lora_A["default"].weight_orig.grad.count_nonzero() <= 4 * 64 // 2


@pytest.mark.parametrize("checkpointing", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_calls_the_modules_again_in_backward(checkpointing):
    model = in_float64("linear", lora_dropout=0.25).train()
    attach(dora(model), "mask")
    x, seen = example(model), recorded(model, ("lora_A",))
    torch.manual_seed(3)
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    seen.clear()
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=checkpointing)
    y.square().sum().backward()
    assert len(seen) == 2
    assert distance(x.grad, want) < 1e-12


@pytest.mark.parametrize("how", ["mask", "parametrization", "hook"])
def test_compiled(how):
    model = in_float64("linear")
    if how == "hook":
        dora(model).lora_B["default"].register_forward_hook(ablate)
    else:
        attach(dora(model), how)
    x = example(model)
    wanted = [x, *leaves(dora(model)).values()]
    plain, compiled = (f(x) for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")))
    assert distance(compiled, plain.detach()) < 1e-12
    expected, found = (torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (plain, compiled))
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or (got - want).norm() <= 1e-11 * want.norm()


@pytest.mark.implementation("reference")
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_the_reference_implementation_calls_them_too(kind):
    model = in_float64(kind)
    attach(dora(model), "mask", "ABm")
    check_computed(model, example(model))
