"""Fixtures of the tests of norms."""

import pytest
import torch
from norm_fixtures import TwoLayers
from peft import get_peft_model

from dora_peft import DoraConfig
from dora_peft.norms import Norm


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = DoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], init_lora_weights=False)
    return get_peft_model(TwoLayers(), config)


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with every refresh of a norm."""
    calls, original = [], Norm.renew
    monkeypatch.setattr(Norm, "renew", lambda *args: (calls.append(args), original(*args))[1])
    return calls
