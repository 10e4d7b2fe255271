"""What closes the shortcut of a linear layer, one scenario each.

Each scenario changes something after the shortcut was made and compares the output with that of a layer that has none.
"""

import copy
import warnings

import pytest
import torch
from layer_fixtures import One, adapted, dora, perturb
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dora_peft
from dora_peft import DoraConfig, norms

MODES = ["evaluation", "training"]


def prepared(mode, dropout=0.0):
    """A layer whose shortcut was used, its model, and an input."""
    model = adapted("linear", lora_dropout=dropout).train(mode == "training")
    model.add_adapter("other", DoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    layer, x = dora(model), torch.randn(2, 12)
    perturb(layer, "other", seed=3)
    with torch.set_grad_enabled(mode == "training"):
        for _ in range(2):
            layer(x)
        assert takes_shortcut(layer, x)
    return model, layer, x


def takes_shortcut(layer, x):
    return layer._shortcut is not None and layer._shortcut(layer, layer, x) is not None


def without_shortcut(layer, x):
    # a copy has none
    twin = copy.deepcopy(layer)
    assert twin._shortcut is None
    return twin(x)


def differs_and_follows(mode, change):
    """The output follows `change(model, layer)`, which alters it."""
    model, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"):
        before = layer(x)
        change(model, layer)
        expected = without_shortcut(layer, x)
        assert not torch.allclose(expected, before, rtol=1e-3), "the change is none"
        torch.testing.assert_close(layer(x), expected)


def write(name):
    def change(model, layer):
        tensors = dict(
            zip(("A", "B", "m"), (*layer.factor_parameters("default"), layer.magnitude("default")), strict=True)
        )
        tensors[name].data.mul_(1.5)

    return lambda mode: differs_and_follows(mode, change)


def scaling(mode):
    differs_and_follows(mode, lambda model, layer: layer.set_scale("default", 3.0))


def base_through_data(mode):
    differs_and_follows(mode, lambda model, layer: layer.get_base_layer().weight.data.mul_(2))


def base_weight(mode):
    def change(model, layer):
        layer.get_base_layer().weight = nn.Parameter(torch.randn(10, 12), requires_grad=False)

    differs_and_follows(mode, change)


def base_weight_moved(mode):
    """Conv1D is multiplied by as a view, which stays behind when the parameter's data is exchanged."""
    model = adapted("Conv1D").train(mode == "training")
    layer, x = dora(model), torch.randn(2, 12)
    with torch.set_grad_enabled(mode == "training"):
        for _ in range(2):
            layer(x)
        weight = layer.get_base_layer().weight
        weight.data = weight.data.clone() * 2
        torch.testing.assert_close(layer(x), without_shortcut(layer, x))


def base_weight_at_the_same_place(mode):
    """What was the weight holds something else now, and another parameter its memory."""
    _, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"):
        expected, base = layer(x), layer.get_base_layer()
        before = base.weight
        base.weight = nn.Parameter(before.data, requires_grad=False)
        before.data = torch.zeros(10, 12)
        torch.testing.assert_close(layer(x), expected)


def base_weight_trained(mode):
    _, layer, x = prepared(mode)
    weight = layer.get_base_layer().weight.requires_grad_()
    layer(x).sum().backward()
    assert weight.grad is not None


def base_bias(mode):
    def change(model, layer):
        layer.get_base_layer().bias = nn.Parameter(torch.randn(10), requires_grad=False)

    differs_and_follows(mode, change)


def base_bias_of_another_kind(mode):
    """A buffer, an attribute or a parametrization, before the first pass or after some."""

    class Shift(nn.Module):
        def forward(self, bias):
            return bias + 1

    def parametrize(base):
        nn.utils.parametrize.register_parametrization(base, "bias", Shift())

    def attribute(base):
        del base.bias
        base.bias = torch.ones(10)

    def buffer(base):
        del base.bias
        base.register_buffer("bias", torch.ones(10))

    for change in (parametrize, attribute, buffer):
        _, layer, x = prepared(mode)
        with torch.set_grad_enabled(mode == "training"):
            change(layer.get_base_layer())
            expected = without_shortcut(layer, x)
            for _ in range(3):
                torch.testing.assert_close(layer(x), expected)


def base_layer(mode):
    """Another module around the same weight, as a wrapper that shifts the output."""

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    def change(model, layer):
        base, new = layer.base_layer, Shifted(12, 10)
        new._parameters = base._parameters
        layer.base_layer = new

    differs_and_follows(mode, change)


def forward_of_the_instance(mode):
    def change(model, layer):
        base = layer.get_base_layer()
        base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) + 1

    differs_and_follows(mode, change)


def forward_hook(mode):
    def change(model, layer):
        layer.get_base_layer().register_forward_hook(lambda module, args, out: out + 1)

    differs_and_follows(mode, change)


def forward_pre_hook(mode):
    def change(model, layer):
        layer.get_base_layer().register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    differs_and_follows(mode, change)


def backward_hooks(mode, *names):
    for name in names:
        _, layer, x = prepared("training")
        seen = []
        getattr(layer.get_base_layer(), name)(lambda *_, seen=seen: seen.append(1) or None)
        layer(x.requires_grad_()).sum().backward()
        assert seen


def backward_hook(mode):
    backward_hooks(mode, "register_full_backward_hook")


def backward_pre_hook(mode):
    backward_hooks(mode, "register_full_backward_pre_hook")


def active_adapter(mode):
    differs_and_follows(mode, lambda model, layer: model.set_adapter("other"))


def several_active_adapters(mode):
    differs_and_follows(mode, lambda model, layer: model.base_model.set_adapter(["default", "other"]))


def list_of_active_adapters(mode):
    """Changed in place, by code that knows PEFT's attribute."""
    _, layer, x = prepared(mode)
    layer._active_adapter = ["default"]
    with torch.set_grad_enabled(mode == "training"):
        layer(x)
        layer._active_adapter.append("other")
        torch.testing.assert_close(layer(x), without_shortcut(layer, x))


def merged(mode):
    """What is merged is computed by the base layer, whatever becomes of the original weight meanwhile."""
    model, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"):
        before = layer(x)
        model.merge_adapter()
        merged = layer.get_base_layer()(x)
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x), merged)
        model.unmerge_adapter()
        torch.testing.assert_close(layer(x), before)


def merged_in_place(mode):
    """PEFT's own layers, while accelerate_use_dora() is on: they write into the weight."""
    with dora_peft.accelerate_use_dora():
        model = get_peft_model(One(nn.Linear(12, 10)), LoraConfig(r=2, target_modules=["layer"], use_dora=True))
        layer, x = model.base_model.model.layer, torch.randn(2, 12)
        model.train(mode == "training")
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_()
        with torch.set_grad_enabled(mode == "training"):
            before = [layer(x) for _ in range(2)][-1]
            assert norms.views[layer]._shortcut is not None
            model.merge_adapter()
            torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
            model.unmerge_adapter()
            for _ in range(2):
                layer(x)
            # as code that merges into the memory of the weight leaves it
            layer.merged_adapters.append("default")
            assert torch.equal(layer(x), layer.get_base_layer()(x))


def disabled(mode):
    model, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"), model.disable_adapter():
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def training(mode):
    """Dropout acts in training alone."""
    model, layer, x = prepared(mode, dropout=0.9)
    shortcut = layer._shortcut
    model.train(mode != "training")
    # another thread may have just made one
    layer._shortcut = shortcut
    with torch.set_grad_enabled(mode == "training"):
        assert torch.equal(layer(x), layer(x)) == (mode == "training")


def gradients(mode):
    _, layer, x = prepared("evaluation")
    layer(x).sum().backward()
    assert layer.magnitude("default").grad is not None


def detached_norm(mode):
    _, layer, x = prepared("training")
    layer.detach_norm["default"] = False
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        one.zero_grad()
        one(x).sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, twin.lora_A["default"].weight.grad)


def dropout_probability(mode):
    _, layer, x = prepared("training", dropout=0.5)
    layer.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(layer(x), without_shortcut(layer, x))


def dropout_module(mode):
    """Another module in its place: with it there is no dropout of ours."""
    _, layer, x = prepared("training", dropout=0.5)
    layer.lora_dropout["default"] = nn.Identity()
    layer.lora_dropout["default"].p = 0.5
    torch.testing.assert_close(layer(x), without_shortcut(layer, x))


def dropout_mode(mode):
    """The paper's dropout drops a part of the base product too: without B it is all that there is."""
    _, layer, x = prepared("training", dropout=0.5)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.magnitude("default").mul_(2)
    layer(x)
    layer.dropout_mode["default"] = "paper"
    assert not torch.equal(layer(x), layer(x))


def low_magnitude(mode):
    _, layer, x = prepared("training")
    layer.magnitude("default").data = layer.magnitude("default").data.bfloat16()
    with pytest.warns(UserWarning, match="will not be trained"):
        layer(x)


def dtype_of_the_input(mode):
    _, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"):
        torch.testing.assert_close(layer(x.double()), without_shortcut(layer, x.double()))


def autocast(mode):
    """Of so many tokens that without autocast the weight would be composed, and B A rounded away with it."""
    _, layer, _ = prepared(mode)
    x = torch.randn(40, 12)
    with torch.set_grad_enabled(mode == "training"), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, without_shortcut(layer, x))


def implementation(mode):
    _, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"), dora_peft.implementation("reference"):
        assert not takes_shortcut(layer, x)


def transform(mode):
    """A transform's own parameters: not those that the layer holds."""
    _, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"):
        torch.func.vmap(lambda row: layer(row))(x)
        found = []
        torch.func.vmap(lambda row: found.append(takes_shortcut(layer, row)) or row)(x)
    assert found == [False]


def jit_trace(mode):
    """A recording has to hold for other weights as well."""
    _, layer, x = prepared(mode)
    found = []
    with torch.set_grad_enabled(mode == "training"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda x: found.append(takes_shortcut(layer, x)) or x + 1, x, check_trace=False)
    assert found == [False]


def fx_recording(mode):
    _, layer, x = prepared(mode)
    found = []
    with torch.set_grad_enabled(mode == "training"):
        make_fx(lambda x: found.append(takes_shortcut(layer, x)) or x + 1)(x)
    assert found == [False]


def recording_after_another_mode(mode):
    """A pass under a mode that only looks on leaves nothing that a recording takes."""

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    _, layer, x = prepared(mode)
    with torch.set_grad_enabled(mode == "training"):
        with Looking():
            layer(x)
        graph = make_fx(lambda x: layer(x))(x)
        layer.lora_B["default"].weight.data.mul_(1.5)
        torch.testing.assert_close(graph(x), layer(x))


def an_ensemble_after_a_pass(mode):
    _, layer, x = prepared(mode)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.vmap(lambda parameters: torch.func.functional_call(layer, parameters, (x,)))(stacked)
    assert found.shape == (2, 2, 10)


def an_adapter_that_is_gone(mode):
    model, layer, x = prepared(mode)
    shortcut = layer._shortcut
    with pytest.warns(UserWarning, match="now deleted"):
        model.delete_adapter("default")
    layer._shortcut = shortcut
    with torch.set_grad_enabled(mode == "training"):
        layer(x)
