"""What becomes of a layer's records when it is loaded, moved, replicated, or loses an adapter."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.norms import lifecycle


@pytest.fixture
def layer():
    """A layer whose norm is known, with something folded for evaluation."""
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), DoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    model.eval()
    with torch.no_grad():
        layer(torch.randn(3, 5))
    assert layer._norms["default"].known is not None
    assert layer._norms["default"].folded is not None
    return layer


def test_settled_rows_are_known(layer):
    tied = torch.tensor([True, False, False, True])
    lifecycle.settle_as(layer, "default", tied)
    assert lifecycle.is_settled(layer, "default")
    assert torch.equal(layer._norms["default"].tied, tied)
    # nothing of the norm before is left
    assert layer._norms["default"].known is None


def test_unsettled_rows_are_not(layer):
    lifecycle.unsettle(layer, "default")
    assert not lifecycle.is_settled(layer, "default")
    layer(torch.randn(3, 5))
    assert lifecycle.is_settled(layer, "default")


def test_what_is_forgotten_is_computed_again_but_for_the_tied_rows(layer):
    tied, expected = torch.tensor([True, False, False, True]), layer.scale("default").clone()
    layer._norms["default"].tied = tied
    lifecycle.forget(layer)
    assert lifecycle.is_settled(layer, "default")
    assert layer._norms["default"].tied is tied
    assert layer._norms["default"].known is None
    assert layer._base_norm is None
    layer._norms["default"].tied = None
    assert torch.equal(layer.scale("default"), expected)


def test_a_dropped_adapter_is_unknown(layer):
    lifecycle.drop(layer, "default")
    lifecycle.drop(layer, "default")
    assert not lifecycle.is_settled(layer, "default")
    assert layer._norms == {}


def test_leaving_evaluation_keeps_the_norm(layer):
    known = layer._norms["default"].known
    lifecycle.leave_evaluation(layer)
    assert layer._norms["default"].folded is None
    assert layer._norms["default"].known is known


def test_memory_is_let_go(layer):
    layer._norms["default"].device = SimpleNamespace()
    layer._base_norm.weight.view = torch.zeros(1)
    lifecycle.let_go(layer)
    assert layer._norms["default"].device is None
    assert layer._base_norm.weight.view is None
    layer._base_norm = None
    lifecycle.let_go(layer)


def test_a_replica_gets_ties_alone(layer):
    lifecycle.settle_as(layer, "default", torch.tensor([True, False, False, False]))
    replica = SimpleNamespace()
    lifecycle.replicate(layer, replica)
    copied = replica._norms["default"]
    assert copied is not layer._norms["default"]
    assert (copied.settled, copied.known, copied.folded, copied.device) == (True, None, None, None)
    assert torch.equal(copied.tied, layer._norms["default"].tied)
    assert replica._base_norm is None
