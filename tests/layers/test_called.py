"""Hooks on A, B, m and dropout run, and the fast road comes back when they are gone."""

import copy

import pytest
import torch
from called_fixtures import KINDS, ablate, in_float64, leaves_of, recorded, takes_fast_road
from layer_fixtures import (
    One,
    adapted,
    base_of,
    distance,
    dora,
    example,
    expected_warning,
    seeded,
    with_two_adapters,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as torch_module

import dora_peft


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_what_pefts_lora_layer_gives_them_once_a_pass(kind, training, dtype):
    ours = adapted(kind, dtype, lora_dropout=0.5).train(training)
    torch.manual_seed(0)
    with expected_warning(base_of(ours)):
        options = {"r": 4, "lora_alpha": 3, "target_modules": ["layer"], "lora_dropout": 0.5}
        options["fan_in_fan_out"] = kind == "Conv1D"
        theirs = get_peft_model(One(copy.deepcopy(base_of(ours))), LoraConfig(**options)).train(training)
    for factor in ("lora_A", "lora_B"):
        getattr(dora(theirs), factor).load_state_dict(getattr(dora(ours), factor).state_dict())
    x = example(ours)
    dora(ours)(x)
    found, expected = recorded(ours), recorded(theirs)
    for model in (ours, theirs):
        torch.manual_seed(1)
        model(x)
    assert [name for name, *_ in found] == ["lora_dropout", "lora_A", "lora_B"]
    for (name, *got), (other, *want) in zip(found, expected, strict=True):
        assert name == other
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def shift(module, args, out):
    return out + 0.1


def scale_input(module, args):
    return (args[0] * 1.5,)


HOOKS = {
    "ablate B": ("lora_B", "register_forward_hook", ablate),
    "shift A": ("lora_A", "register_forward_hook", shift),
    "input of A": ("lora_A", "register_forward_pre_hook", scale_input),
    "input of B": ("lora_B", "register_forward_pre_hook", scale_input),
    "gradient of A": ("lora_A", "register_full_backward_hook", lambda module, grads, outs: (2 * grads[0],)),
    "gradient of B": ("lora_B", "register_full_backward_pre_hook", lambda module, grads: (3 * grads[0],)),
}


def but_for_the_identity(hook, width):
    """A hook that lets PEFT's second call pass, by which its use_dora reads B A off an identity for the norm."""

    def around(module, args, *rest):
        tensor = args[0] if around.name == "lora_A" else (rest[0] if rest else args[0])
        first = tensor[0] if isinstance(tensor, tuple) else tensor
        return None if first.shape[:-1] == (width,) else hook(module, args, *rest)

    around.name = None
    return around


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "conv3d"])
def test_hooks_change_what_they_change_in_pefts_use_dora(kind, hook):
    ours = in_float64(kind)
    x = example(ours)
    options = {"r": 4, "lora_alpha": 3, "target_modules": ["layer"], "fan_in_fan_out": kind == "Conv1D"}
    theirs = get_peft_model(One(copy.deepcopy(base_of(ours))), LoraConfig(use_dora=True, **options)).double()
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(dora(theirs), name).load_state_dict(getattr(dora(ours), name).state_dict())
    plain = ours(x).detach()
    module, register, function = HOOKS[hook]
    results = []
    for model in (ours, theirs):
        getattr(getattr(dora(model), module)["default"], register)(but_for_the_identity(function, 12))
        y, leaf = model(x), [x, *leaves_of(model)]
        probe = torch.randn(y.shape, generator=seeded(2), dtype=y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, probe)])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm() + 1e-15
    assert "gradient" in hook or distance(results[0][0], plain) > 1e-3


@pytest.mark.parametrize("how", ["class", "forward", "bias", "module"])
def test_another_computation_in_the_place_of_a_factor(how):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = in_float64("linear")
    layer, x = dora(model), example(model)
    model(x), model(x)
    old = layer.lora_B["default"]
    want = copy.deepcopy(old)
    factor, extra = 2, 0
    if how == "class":
        old.__class__ = Doubled
    elif how == "forward":
        forward = old.forward
        old.forward = lambda x: 2 * forward(x)
    elif how == "module":
        layer.lora_B["default"] = Doubled(4, 10, bias=False).double()
        layer.lora_B["default"].weight = old.weight
    else:
        old.bias = nn.Parameter(torch.ones(10, dtype=torch.float64))
        factor, extra = 1, 1
    c = layer.scale("default")
    base, s = base_of(model), layer.scaling["default"]
    low_rank = factor * want(layer.lora_A["default"](x)) + extra
    expected = c * (x @ base.weight.T + s * low_rank) + base.bias
    assert distance(model(x), expected.detach()) < 1e-12


@pytest.mark.parametrize("symbol", ["lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"])
def test_a_hook_closes_the_fast_road_for_as_long_as_it_is_there(symbol):
    model = in_float64("linear", lora_dropout=0.25).train()
    x, seen = example(model), []
    assert takes_fast_road(model, x)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(getattr(dora(model), symbol)["default"], register)(lambda *_: seen.append(1))
        for count in (1, 2):
            model(x).sum().backward()
            assert len(seen) == count
        handle.remove()
        seen.clear()
        assert takes_fast_road(model, x)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_hooks_of_all_modules_see_each_module_once(kind):
    model = in_float64(kind, lora_dropout=0.25)
    x, seen = example(model), []
    before = [model.eval()(x) for _ in range(3)][-1]
    handle = torch_module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        after = model(x)
    finally:
        handle.remove()
    layer = dora(model)
    wanted = [layer, layer.base_layer]
    wanted += [] if kind == "embedding" else [m["default"] for m in (layer.lora_dropout, layer.lora_A, layer.lora_B)]
    assert [sum(m is one for m in seen) for one in wanted] == [1] * len(wanted)
    assert {id(m) for m in seen} <= {id(m) for m in model.modules()}
    assert distance(after, before.detach()) < 1e-12
    assert takes_fast_road(model, x)


def test_a_hook_on_m_may_change_it():
    model = in_float64("linear")
    x = example(model)
    before = model(x).detach()
    dora(model).lora_magnitude_vector["default"].register_forward_hook(lambda module, args, m: 2 * m)
    bias = base_of(model).bias
    assert distance(model(x) - bias, 2 * (before - bias).detach()) < 1e-12


def test_dropout_switched_on_in_evaluation_drops():
    """As for Monte Carlo estimates of uncertainty."""
    model = in_float64("linear", lora_dropout=0.5).eval()
    x = example(model, grad=False)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        dora(model).lora_dropout["default"].train()
        assert not torch.equal(model(x), model(x))
        dora(model).train()
        dora(model).lora_dropout["default"].eval()
        assert torch.equal(model(x), model(x))


def test_paper_dropout_drops_both_branches_alike():
    model = in_float64("linear", lora_dropout=0.5, dropout_mode="paper").train()
    layer, x, seen = dora(model), example(model), []
    layer.lora_dropout["default"].register_forward_hook(lambda _, args, out: seen.append(out))
    y = model(x)
    base = base_of(model)
    A, B = layer.factors("default")
    m, s = layer.magnitude("default"), layer.scaling["default"]
    options = {"dropped": seen[0], "dropout_mode": "paper"}
    want = dora_peft.reference.dora_linear(x, base.weight, A, B, m, s, base.bias, **options)
    assert len(seen) == 1
    assert distance(y, want.detach()) < 1e-12


def test_each_of_several_active_adapters_is_called():
    model = with_two_adapters("linear")
    layer, x, seen = dora(model), example(model), []
    model.base_model.set_adapter(["default", "second"])
    before = model(x).detach()
    for name in ("default", "second"):
        layer.lora_B[name].register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    assert distance(model(x), before) < 1e-12
    assert seen == ["default", "second"]


def test_a_mixed_batch_calls_each_adapter_with_its_samples():
    model = with_two_adapters("linear").eval()
    layer, x, seen = dora(model), example(model, grad=False), {}
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        for name in ("default", "second"):
            layer.lora_A[name].register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0]}))
        assert distance(model(x, adapter_names=names), before) < 1e-12
    assert torch.equal(seen["default"], x[2:])
    assert torch.equal(seen["second"], x[:1])


def test_pefts_own_layers_are_left_to_peft():
    torch.manual_seed(0)
    model = get_peft_model(One(nn.Linear(12, 10)), LoraConfig(r=2, target_modules=["layer"], use_dora=True))
    layer, x, seen = dora(model), torch.randn(3, 12), []
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    handle = layer.lora_B["default"].register_forward_hook(ablate)
    expected = model(x)
    handle.remove()
    with dora_peft.accelerate_use_dora():
        before = [model(x) for _ in range(3)][-1]
        layer.lora_B["default"].register_forward_hook(ablate)
        with pytest.warns(UserWarning, match="hooks, masks or parametrizations"):
            assert torch.equal(model(x), expected)
    assert not torch.allclose(before, expected)
    assert not seen
