"""Which modules an adapter goes on, and what is said of the others."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig, DoraLayer
from dora_peft.adapters import targets


class Block(nn.Module):
    def __init__(self, model_type=None):
        super().__init__()
        self.up, self.act = nn.Linear(3, 4), nn.ReLU()
        if model_type is not None:
            self.config = type("Config", (), {"model_type": model_type})()


@pytest.mark.parametrize(
    ("only", "key", "expected"),
    [
        (["gate"], "a.gate", True),
        (["gate"], "a.up", False),
        (r".*\.gate", "a.gate", True),
        (None, "a.gate", False),
    ],
)
def test_magnitude_only(only, key, expected):
    config = DoraConfig(target_modules=["up"], magnitude_only_modules=only)
    assert targets.is_magnitude_only(config, key) is expected
    assert config.target_modules == {"up"}


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_modules_that_mamba_never_calls(name):
    with pytest.raises(ValueError, match=f"'{name}' is incompatible with Mamba"):
        targets.check_called(Block("mamba2"), name)
    targets.check_called(Block("mamba2"), "in_proj")
    targets.check_called(Block("llama"), name)
    targets.check_called(Block(), name)


def options(config):
    return {"r": 2, "lora_alpha": 4, "config": config, "magnitude_only": False}


def test_a_layer_around_a_module():
    base, config = nn.Linear(3, 4), DoraConfig(r=2, target_modules=["up"])
    layer = targets.wrapped(base, "one", Block(), "a.up", options(config))
    assert layer.base_layer is base
    assert layer.name == "a.up"
    assert list(layer.lora_A) == ["one"]


@pytest.mark.parametrize(
    ("parent", "target", "named"),
    [
        (nn.MultiheadAttention(4, 2), nn.Linear(4, 4), "nn.MultiheadAttention uses its weight without calling it"),
        (Block(), nn.ReLU(), "is not supported. Currently, only"),
    ],
)
def test_what_cannot_be_adapted_is_named(parent, target, named):
    with pytest.raises(ValueError, match=named) as caught:
        targets.wrapped(target, "one", parent, "a.b", options(DoraConfig(r=2)))
    assert "'a.b'" in str(caught.value)


def test_an_adapter_on_no_module():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"Target modules \{'up'\} not found in the base model"):
        targets.check_found(model, "one", DoraConfig(target_modules=["up"]))
    config = DoraConfig(target_modules=["up"], magnitude_only_modules=["gate"])
    with pytest.raises(ValueError, match=r"Magnitude-only modules \{'gate'\} not found"):
        targets.check_found(model, "one", config)
    model[0] = targets.wrapped(model[0], "one", model, "0", options(DoraConfig(r=2)))
    targets.check_found(model, "one", DoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="not found"):
        targets.check_found(model, "two", DoraConfig(target_modules=["0"]))


def test_an_error_says_what_could_be_adapted():
    error = targets.with_names(ValueError("Target modules x not found in the base model."), Block())
    assert "Modules of Block that can be adapted are named up;" in str(error)
    assert targets.with_names(ValueError("something else"), Block()) is None


class Attending(nn.Module):
    """One of torch's own transformers, whose attention reads the weight of its output layer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.mark.parametrize(
    ("field", "written"),
    [
        ("target_modules", "all-linear"),
        ("target_modules", "ALL-LINEAR"),
        ("magnitude_only_modules", "all-linear"),
    ],
)
def test_all_linear_skips_what_is_not_called(field, written):
    model = Attending()
    with pytest.warns(UserWarning, match=r"leaves out encoder\.self_attn\.out_proj"):
        model = get_peft_model(model, DoraConfig(r=2, **{field: written}))
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, DoraLayer)}
    assert adapted == {"encoder.linear1", "encoder.linear2", "head"}


def test_all_linear_without_attention_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), DoraConfig(r=2, target_modules="all-linear"))
    assert isinstance(model.base_model.model[0], DoraLayer)


def test_all_linear_skips_what_mamba_never_calls():
    model = Block("mamba2")
    model.out_proj = nn.Linear(4, 3)
    with pytest.warns(UserWarning, match="leaves out out_proj"):
        assert targets.all_linear(model, DoraConfig()) == {"up"}


def test_naming_the_output_layer_of_attention_is_still_refused():
    with pytest.raises(ValueError, match="uses its weight without calling it"):
        get_peft_model(Attending(), DoraConfig(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_inside_torchs_transformer_runs(training, grad):
    """In evaluation without gradients torch has a way of its own, which reads the weights of linear1 and linear2."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="leaves out"):
        model = get_peft_model(Attending(), DoraConfig(r=2, target_modules="all-linear")).train(training)
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        before = model(x)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and "encoder" in name:
                    parameter.normal_()
        after = model(x)
    assert (after - before).abs().max() > 1e-2


def test_a_padded_batch_through_torchs_encoder():
    """Which in evaluation turns it into nested tensors, for the way of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = get_peft_model(nn.TransformerEncoder(layer, 2), DoraConfig(r=2, target_modules=["linear1", "linear2"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    # without dropout the same, but never by that way
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


def test_all_linear_skips_what_another_name_ends_like():
    """PEFT matches names by their ends: the outer out_proj would bring the attention's back in."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "out_proj": nn.Linear(4, 4), "a+b": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="leaves out attn.out_proj"):
        adapted = get_peft_model(model, DoraConfig(r=2, target_modules="all-linear"))
    layers = {name for name, module in adapted.base_model.model.named_modules() if isinstance(module, DoraLayer)}
    assert layers == {"out_proj", "a+b"}
