"""Making an adapter on one layer."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.layers import create


def adapted(base, **options):
    return get_peft_model(nn.Sequential(base), DoraConfig(**{"r": 2, "target_modules": ["0"], **options})).base_model


def test_m_is_the_norm_of_what_was_initialised():
    base = nn.Linear(6, 4)
    layer = adapted(base, init_lora_weights=False).model[0]
    A, B = layer.factors("default")
    composed = base.weight + layer.scaling["default"] * B @ A
    assert B.abs().min() > 0
    torch.testing.assert_close(layer.magnitude("default").detach(), composed.detach().norm(dim=1))


def test_a_magnitude_alone_has_zero_factors():
    model = nn.ModuleDict({"up": nn.Linear(6, 4), "gate": nn.Linear(6, 4)})
    model.forward = None
    config = DoraConfig(r=2, target_modules=["up"], magnitude_only_modules=["gate"], init_lora_weights=False)
    layer = get_peft_model(model, config).base_model.model["gate"]
    assert layer.magnitude_only["default"]
    assert all(not factor.any() for factor in layer.factor_parameters("default"))


def test_an_adapter_made_in_evaluation_does_not_drop():
    base = adapted(nn.Linear(6, 4), lora_dropout=0.5)
    base.eval()
    layer = base.model[0]
    create.create(layer, "second", 3, 6, DoraConfig(r=3, lora_dropout=0.5), False)
    assert not layer.lora_dropout["second"].training
    assert layer.r["second"] == 3
    assert layer.scaling["second"] == 2


@pytest.mark.parametrize(
    ("rank", "named"), [(17, "Rank r=17 is larger than module '0' itself"), (0, "positive integer")]
)
def test_a_rank_out_of_range_leaves_nothing(rank, named):
    layer = adapted(nn.Linear(6, 4)).model[0]
    with pytest.raises(ValueError, match=named):
        create.create(layer, "second", rank, 4, DoraConfig(), False)
    assert "second" not in layer.lora_A
    assert "second" not in layer.r


def test_an_initialisation_of_linear_layers_is_refused_elsewhere():
    layer = adapted(nn.Conv2d(3, 4, 2)).model[0]
    with pytest.raises(ValueError, match=r"'orthogonal' is not available for module '0' \(Conv2d\)"):
        create.create(layer, "second", 2, 4, DoraConfig(init_lora_weights="orthogonal"), False)
    assert "second" not in layer.lora_A
