"""The evaluation shortcut of a linear layer: every condition that closes it is needed, and is tested here.

Each scenario changes something after the shortcut was made and compares the output with that of a layer that has none.
The last tests take one condition after the other out of the shortcut: some scenario has to fail then.
"""

import ast
import copy
import inspect
import textwrap

import pytest
import torch
from layer_fixtures import One, adapted, dora, perturb
from peft import get_peft_model
from torch import nn

import dora_peft
from dora_peft import DoraConfig
from dora_peft.layers import kinds
from dora_peft.layers.kinds import Shortcut

pytestmark = [pytest.mark.cached_norms, pytest.mark.implementation("torch")]


def prepared():
    """A layer in evaluation whose shortcut was used, its model, and an input."""
    model = adapted("linear").eval()
    model.add_adapter("other", DoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    layer, x = dora(model), torch.randn(2, 12)
    perturb(layer, "other", seed=3)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        assert layer._shortcut is not None
        assert layer._shortcut.is_open(layer)
    return model, layer, x


def without_shortcut(layer, x):
    twin = copy.deepcopy(layer)  # a copy has none
    assert twin._shortcut is None
    return twin(x)


def differs_and_follows(change):
    """The output follows `change(model, layer)`, which alters it."""
    model, layer, x = prepared()
    with torch.no_grad():
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

    return lambda: differs_and_follows(change)


def scaling():
    differs_and_follows(lambda model, layer: layer.set_scale("default", 3.0))


def base_through_data():
    differs_and_follows(lambda model, layer: layer.get_base_layer().weight.data.mul_(2))


def base_weight():
    def change(model, layer):
        layer.get_base_layer().weight = nn.Parameter(torch.randn(10, 12), requires_grad=False)

    differs_and_follows(change)


def base_bias():
    def change(model, layer):
        layer.get_base_layer().bias = nn.Parameter(torch.randn(10), requires_grad=False)

    differs_and_follows(change)


def base_layer():
    """Another module around the same weight, as a wrapper that shifts the output."""

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    def change(model, layer):
        base, new = layer.base_layer, Shifted(12, 10)
        new._parameters = base._parameters
        layer.base_layer = new

    differs_and_follows(change)


def forward_of_the_instance():
    def change(model, layer):
        base = layer.get_base_layer()
        base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) + 1

    differs_and_follows(change)


def forward_hook():
    def change(model, layer):
        layer.get_base_layer().register_forward_hook(lambda module, args, out: out + 1)

    differs_and_follows(change)


def forward_pre_hook():
    def change(model, layer):
        layer.get_base_layer().register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    differs_and_follows(change)


def active_adapter():
    differs_and_follows(lambda model, layer: model.set_adapter("other"))


def several_active_adapters():
    differs_and_follows(lambda model, layer: model.base_model.set_adapter(["default", "other"]))


def merged():
    """What is merged is computed by the base layer, whatever becomes of the original weight meanwhile."""
    model, layer, x = prepared()
    with torch.no_grad():
        before = layer(x)
        model.merge_adapter()
        merged = layer.get_base_layer()(x)
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x), merged)
        layer.get_base_layer().weight.mul_(2)
        assert torch.equal(layer(x), layer.get_base_layer()(x))
        model.unmerge_adapter()
        torch.testing.assert_close(layer(x), before)


def disabled():
    model, layer, x = prepared()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def training():
    model, layer, x = prepared()
    shortcut = layer._shortcut
    layer.lora_dropout["default"] = nn.Dropout(0.9)
    model.train()
    layer._shortcut = shortcut  # another thread may have just made one
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))


def gradients():
    _, layer, x = prepared()
    layer(x).sum().backward()
    assert layer.magnitude("default").grad is not None


def by_autograd():
    """A transform's own parameters: not those that the layer holds."""
    _, layer, _ = prepared()
    with torch.no_grad(), dora_peft.implementation("reference"):
        assert not layer._shortcut.is_open(layer)


def checking():
    _, layer, _ = prepared()
    with torch.no_grad(), dora_peft.checking():
        assert not layer._shortcut.is_open(layer)


SCENARIOS = {
    "A": write("A"),
    "B": write("B"),
    "m": write("m"),
    **{
        function.__name__: function
        for function in (
            scaling, base_through_data, base_weight, base_bias, base_layer, forward_of_the_instance, forward_hook,
            forward_pre_hook, active_adapter, several_active_adapters, merged, disabled, training, gradients,
            by_autograd, checking,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_closes_the_shortcut(name):
    SCENARIOS[name]()


def conditions(tree):
    """The places in `is_open` where one condition stands: operands of its `or`s, and of the last `and`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp):
            for number, operand in enumerate(node.values):
                yield node, number, operand


def parsed():
    return ast.parse(textwrap.dedent(inspect.getsource(Shortcut.is_open)))


def without(number):
    """`is_open` with one condition taken out."""
    tree = parsed()
    node, place, _ = list(conditions(tree))[number]
    node.values[place] = ast.Constant(isinstance(node.op, ast.And))
    namespace = dict(vars(kinds))
    exec(compile(ast.fix_missing_locations(tree), "mutated", "exec"), namespace)
    return namespace["is_open"]


TEXTS = [ast.unparse(operand) for _, _, operand in conditions(parsed())]


def test_the_conditions_are_found():
    assert len(TEXTS) >= 14
    assert any("self.stored" in text for text in TEXTS)
    assert any("_active_adapter" in text for text in TEXTS)


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=TEXTS)
def test_no_condition_can_go(number, monkeypatch):
    monkeypatch.setattr(Shortcut, "is_open", without(number))
    failed = []
    for name, scenario in SCENARIOS.items():
        try:
            scenario()
        except (AssertionError, RuntimeError, AttributeError, KeyError):
            failed.append(name)
    assert failed, f"no scenario notices that '{TEXTS[number]}' is gone"


def test_two_models_share_nothing():
    model = get_peft_model(One(nn.Linear(12, 10)), DoraConfig(r=2, target_modules=["layer"])).eval()
    twin, x = copy.deepcopy(model), torch.randn(2, 12)
    with torch.no_grad():
        expected = model(x)
        dora(twin).lora_B["default"].weight.normal_()
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(model(x), expected)
