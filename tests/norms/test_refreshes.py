"""How often the norm is recomputed: once per adapter and optimizer step."""

import pytest
import torch
from norm_fixtures import edit_base, train_step, true, up, used
from torch.utils.checkpoint import checkpoint

import dora_peft
from dora_peft.bases import base as base_weight_module
from dora_peft.norms import shared


def checkpointed(model, kind):
    """A forward pass of the model with the given kind of gradient checkpointing."""
    if kind == "none":
        return model
    return lambda x: checkpoint(model, x, use_reentrant=kind == "reentrant")


@pytest.mark.cached_norms
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
@pytest.mark.implementation("torch")
def test_one_refresh_per_adapter_and_optimizer_step(kind, model, counted):
    forward = checkpointed(model, kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        counted.clear()
        optimizer.zero_grad()
        for _ in range(4):
            forward(torch.randn(2, 6, requires_grad=True)).sum().backward()
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 6))
        model.train()
        optimizer.step()
        # adapters, once each
        assert len(counted) == 2


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_one_refresh_per_adapter_and_step_with_the_full_gradient(model, counted):
    for module in (up(model), model.base_model.model.down):
        module.detach_norm["default"] = False
    model(torch.randn(2, 6)).sum().backward()
    counted.clear()
    for _ in range(4):
        model(torch.randn(2, 6)).sum().backward()
    assert not counted


@pytest.mark.cached_norms
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.implementation("torch")
def test_evaluation_does_not_refresh(mode, model, counted):
    model.eval()
    with mode():
        model(torch.randn(2, 6))
        counted.clear()
        for _ in range(5):
            model(torch.randn(2, 6))
    assert not counted


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_training_and_evaluation_share_the_norm(model, counted):
    model(torch.randn(2, 6))
    counted.clear()
    model.eval()
    model(torch.randn(2, 6))
    model.train()
    model(torch.randn(2, 6))
    with model.disable_adapter():
        model(torch.randn(2, 6))
    model(torch.randn(2, 6))
    assert not counted


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_merging_does_not_refresh(model, counted):
    model(torch.randn(2, 6))
    counted.clear()
    model.merge_adapter()
    model(torch.randn(2, 6))
    model.unmerge_adapter()
    model(torch.randn(2, 6))
    assert not counted


@pytest.mark.implementation("torch")
def test_the_base_weight_is_read_once(model, monkeypatch):
    """||W0||^2 is kept over optimizer steps, until W0 changes."""
    calls = []
    original = base_weight_module.BaseWeight.row_norms_squared
    monkeypatch.setattr(
        base_weight_module.BaseWeight, "row_norms_squared", lambda self: (calls.append(self), original(self))[1]
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        train_step(model, optimizer)
    assert not calls
    edit_base(model)
    train_step(model, optimizer)
    train_step(model, optimizer)
    assert len(calls) == 1


@pytest.mark.cached_norms
@pytest.mark.implementation("triton")
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_a_device_refreshes_once_per_optimizer_step(kind, model):
    """Counted by the device itself: the host does not know."""
    forward = checkpointed(model, kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(3):
            forward(torch.randn(2, 6, requires_grad=True)).sum().backward()
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 6))
        model.train()
        assert int(up(model)._norms["default"].device.memory.known[4]) == step + 1
        optimizer.step()
    torch.testing.assert_close(used(up(model)), true(up(model)))


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_a_step_on_magnitudes_alone_refreshes_nothing(model, counted):
    for name, p in model.named_parameters():
        p.requires_grad_("magnitude" in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_step(model, optimizer)
    counted.clear()
    for _ in range(2):
        train_step(model, optimizer)
    assert not counted


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_long_inputs_refresh_from_the_composed_weight(model, monkeypatch):
    """If the forward pass computes W0 + s B A anyway, v is its norm."""
    found = []
    original = shared._refresh
    monkeypatch.setattr(shared, "_refresh", lambda *args: found.append(original(*args)) or found[-1])
    train_step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    found.clear()
    model(torch.randn(100, 6))
    assert [composed is not None for _, composed, _ in found] == [True, True]
    layer = up(model)
    with dora_peft.checking():
        torch.testing.assert_close(used(layer), true(layer))
    model(torch.randn(100, 6))
    assert len(found) == 2
