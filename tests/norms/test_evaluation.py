"""What evaluation keeps, and that it follows every change."""

import pytest
import torch
from norm_fixtures import CHANGES, up
from torch import nn


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_evaluation_keeps_little_and_training_drops_it(model):
    model.eval()
    layer = up(model)
    with torch.no_grad():
        model(torch.randn(2, 6))
    kept = layer._norms["default"].folded
    # out x (r + 1)
    assert kept.lora_B.numel() + kept.c.numel() == 10 * (3 + 1)
    # the parameter itself
    assert kept.lora_A is None
    model.train()
    assert layer._norms["default"].folded is None
    assert layer._shortcut is None


def edit_magnitude(model):
    with torch.no_grad():
        up(model).lora_magnitude_vector["default"].weight.mul_(2)


def replace_bias(model):
    up(model).get_base_layer().bias = nn.Parameter(torch.randn(10), requires_grad=False)


def edit_bias(model):
    with torch.no_grad():
        up(model).get_base_layer().bias.add_(1)


@pytest.mark.cached_norms
@pytest.mark.parametrize("change", [*CHANGES, edit_magnitude, replace_bias, edit_bias], ids=lambda c: c.__name__)
@pytest.mark.implementation("torch")
def test_evaluation_follows(change, model):
    model.eval()
    layer, x = up(model), torch.randn(2, 6)
    with torch.no_grad():
        # by its shortcut
        before = [layer(x) for _ in range(3)][-1]
        assert layer._shortcut is not None
        change(model)
        found = [layer(x) for _ in range(3)]
    # with a graph, and so without shortcut
    expected = layer(x).detach()
    assert not torch.allclose(expected, before, rtol=1e-3)
    for y in found:
        torch.testing.assert_close(y, expected)


@pytest.mark.cached_norms
@pytest.mark.parametrize("state", ["merged", "disabled", "hooked"])
def test_evaluation_by_its_shortcut_respects(state, model):
    model.eval()
    layer, x = up(model), torch.randn(2, 6)
    with torch.no_grad():
        adapted = [layer(x) for _ in range(2)][-1]
        if state == "merged":
            model.merge_adapter()
            torch.testing.assert_close(layer(x), adapted)
        elif state == "disabled":
            with model.disable_adapter():
                assert torch.equal(layer(x), layer.get_base_layer()(x))
            torch.testing.assert_close(layer(x), adapted)
        else:
            seen = []
            layer.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
            torch.testing.assert_close(layer(x), adapted)
            assert seen
