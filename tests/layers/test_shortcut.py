"""The shortcut of a linear layer: everything that closes it is needed, and is tested here.

The last tests take one part after the other out of the key: some scenario of shortcut_fixtures.py or
shortcut_modules.py has to fail then.
"""

import ast
import copy
import inspect
import textwrap

import pytest
import shortcut_fixtures
import shortcut_modules
import torch
from layer_fixtures import One, adapted, dora
from peft import get_peft_model
from shortcut_fixtures import MODES, takes_shortcut, write
from torch import nn

import dora_peft
from dora_peft import DoraConfig
from dora_peft.layers import shortcut as subject
from dora_peft.ops import choice

SCENARIOS = {
    **{name: write(name) for name in "ABm"},
    **{
        name: scenario
        for name, scenario in (vars(shortcut_fixtures) | vars(shortcut_modules)).items()
        if inspect.isfunction(scenario) and list(inspect.signature(scenario).parameters) == ["mode"]
    },
}
pytestmark = [pytest.mark.cached_norms, pytest.mark.implementation("torch")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_closes_the_shortcut(name, mode):
    SCENARIOS[name](mode)


def parsed():
    """The function that makes the key, and its parts."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(subject.key_of)))
    (key,) = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "key"
    )
    return tree, key.elts


def without(number):
    """`key_of` with one part taken out of the key."""
    tree, parts = parsed()
    parts[number] = ast.Constant(None)
    namespace = dict(vars(subject))
    exec(compile(ast.fix_missing_locations(tree), "mutated", "exec"), namespace)
    return namespace["key_of"]


TEXTS = [ast.unparse(part) for part in parsed()[1]]


def test_the_parts_are_found():
    assert len(SCENARIOS) >= 35
    assert len(TEXTS) >= 20
    assert "id(weight)" in TEXTS


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=TEXTS)
def test_no_part_can_go(number, monkeypatch):
    monkeypatch.setattr(subject, "key_of", without(number))
    for scenario in SCENARIOS.values():
        for mode in MODES:
            try:
                scenario(mode)
            except (Exception, pytest.fail.Exception):
                return
    pytest.fail(f"no scenario notices that '{TEXTS[number]}' is gone from the key: {', '.join(SCENARIOS)}")


@pytest.mark.parametrize("mode", MODES)
def test_checking_finds_a_stale_norm_through_the_shortcut(mode):
    torch.manual_seed(0)
    model = get_peft_model(One(nn.Linear(120, 100)), DoraConfig(r=2, target_modules=["layer"]))
    layer, x = dora(model.train(mode == "training")), torch.randn(2, 120)
    with torch.set_grad_enabled(mode == "training"):
        for _ in range(2):
            layer(x)
        layer.get_base_layer().weight.data[3, 1:5] += 100
        with dora_peft.checking(), pytest.raises(RuntimeError, match="Stale weight norm"):
            layer(x)


def test_two_models_share_nothing():
    model = get_peft_model(One(nn.Linear(12, 10)), DoraConfig(r=2, target_modules=["layer"])).eval()
    twin, x = copy.deepcopy(model), torch.randn(2, 12)
    with torch.no_grad():
        expected = model(x)
        dora(twin).lora_B["default"].weight.normal_()
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_there_is_none_before_it_is_decided_what_computes(monkeypatch):
    """The next pass decides."""
    layer, x = dora(adapted("linear")), torch.randn(2, 12)
    monkeypatch.setattr(choice, "is_decided", lambda device: False)
    layer(x)
    assert layer._shortcut is None
    monkeypatch.undo()
    layer(x)
    assert takes_shortcut(layer, x)


@pytest.mark.filterwarnings("ignore:The magnitude of module")
@pytest.mark.parametrize("asked", [True, False])
def test_a_magnitude_in_low_precision_leaves_one_if_that_was_asked_for(asked):
    """Otherwise each pass looks whether somebody has to be told."""
    base, config = One(nn.Linear(12, 10, dtype=torch.bfloat16)), DoraConfig(r=2, target_modules=["layer"])
    layer = dora(get_peft_model(base, config, autocast_adapter_dtype=not asked).train())
    magnitude = layer.lora_magnitude_vector["default"]
    if not asked:
        magnitude.weight = nn.Parameter(magnitude.weight.detach().bfloat16())
    assert magnitude.weight.dtype is torch.bfloat16
    layer(torch.randn(2, 12, dtype=torch.bfloat16))
    assert (layer._shortcut is not None) == asked


@pytest.mark.parametrize("mode", MODES)
def test_a_scaling_that_became_a_tensor_closes_it(mode):
    _, layer, x = shortcut_fixtures.prepared(mode)
    layer.scaling["default"] = torch.tensor(float(layer.scaling["default"]))
    with torch.set_grad_enabled(mode == "training"):
        for s in (4.0, 8.0):
            layer.scaling["default"].fill_(s)
            found = [layer(x) for _ in range(2)]
            with dora_peft.implementation("reference"):
                expected = layer(x)
            for y in found:
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
