"""Making an adapter on one layer."""

import pytest
import torch
from called_fixtures import attach
from layer_fixtures import One, base_of, distance, dora, example
from layer_fixtures import adapted as trained
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


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d"])
def test_resetting_starts_anew(kind):
    model = trained(kind, torch.float64).double()
    layer, x = dora(model), example(model)
    base, parameters = base_of(model)(x).detach(), {n: id(p) for n, p in model.named_parameters()}
    model(x), model(x)
    layer.reset_lora_parameters("default", False)
    assert distance(model(x), base) > 1e-2
    for init in (True, "gaussian"):
        if init == "gaussian" and kind != "linear":
            continue
        before = layer.factor_parameters("default")[0].detach().clone()
        layer.reset_lora_parameters("default", init)
        assert distance(model(x), base) < 1e-6
        assert {n: id(p) for n, p in model.named_parameters()} == parameters
        assert not torch.equal(layer.factor_parameters("default")[0], before)
        v = torch.linalg.vector_norm(layer.base_weight().dense(), dim=1)
        torch.testing.assert_close(layer.magnitude("default").detach().flatten(), v)
        for p in layer.factor_parameters("default"):
            assert p.requires_grad
        with torch.no_grad():
            layer.factor_parameters("default")[0].normal_()
            layer.factor_parameters("default")[1].normal_()


def test_what_cannot_be_reset():
    model = trained("linear")
    layer = dora(model)
    with pytest.raises(ValueError, match="'pissa'"):
        layer.reset_lora_parameters("default", "pissa")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        layer.reset_lora_parameters("default", True)
    model.unmerge_adapter()
    attach(layer, "mask", "B")
    with pytest.raises(ValueError, match="computed from others"):
        layer.reset_lora_parameters("default", True)


def test_magnitudes_alone_stay_alone_when_reset():
    model = get_peft_model(One(nn.Linear(4, 3)), DoraConfig(r=2, magnitude_only_modules=["layer"]))
    layer = dora(model)
    with torch.no_grad():
        layer.magnitude("default").mul_(2)
    layer.reset_lora_parameters("default", True)
    assert not any(p.any() for p in layer.factor_parameters("default"))
    torch.testing.assert_close(layer.magnitude("default"), layer.base_layer.weight.norm(dim=1))
