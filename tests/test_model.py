"""Which modules get an adapter, and which parameters train."""

import math

import pytest
import torch
from model_fixtures import IDS, NAMES, config, differs, dora_layers, llama, mlp, output, same, train
from peft import get_peft_model, inject_adapter_in_model
from torch import nn


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_are_trained(bias):
    model = get_peft_model(mlp(), config(bias=bias))
    trained = {n.split(".")[2] for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    assert trained == {"none": set(), "all": {"up", "head"}, "lora_only": {"up"}}[bias]


def test_modules_to_save_are_trained_and_switched():
    model = get_peft_model(mlp(), config(modules_to_save=["head"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if "head" in n} == {
        f"base_model.model.head.modules_to_save.default.{n}" for n in ("weight", "bias")
    }
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.add_(1)
    same(output(model), output(mlp()) + 1)
    with model.disable_adapter():
        same(output(model), output(mlp()))


def test_trainable_tokens():
    config_ = config(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model = get_peft_model(llama(), config_)
    same(output(model), output(llama()))
    parameters = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert [p.shape for p in parameters.values()] == [(2, 16)]
    with torch.no_grad():
        next(iter(parameters.values())).add_(1)
    changed = (output(model) - output(llama())).abs().amax(-1) > 1e-9
    # a causal model changes from the first such token on
    assert changed[0].tolist() == [False, *[True] * 5]
    train(model)
    expected = output(model)
    plain = model.merge_and_unload()
    same(output(plain), expected)


def test_trained_tokens_of_a_targeted_embedding_are_refused():
    """PEFT's LoRA refuses it as well: the rows would be trained twice."""
    base = llama()
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied to modules of type"):
        get_peft_model(base, config(target_modules=["embed_tokens"], trainable_token_indices=[1]))
    assert not dora_layers(base)
    same(output(base), output(llama()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*(q|up)_proj"}, {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"layers.1.self_attn.q_proj"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            {"layers.0.self_attn.q_proj"},
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, {"layers.1.self_attn.q_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, None),
        ({"target_modules": None}, {f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}),
    ],
)
def test_which_modules_are_adapted(options, expected):
    base = llama()
    if expected is None:
        linear = {n for n, m in base.named_modules() if isinstance(m, nn.Linear)}
        expected = {n.removeprefix("model.") for n in linear if n != "lm_head" and "o_proj" not in n}
    found = {n.removeprefix("model.") for n in dora_layers(get_peft_model(base, config(**options)))}
    assert found == expected


def test_rank_and_alpha_patterns():
    patterns = {"rank_pattern": {"v_proj": 1, "layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"q_proj": 7}}
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"], **patterns))
    found = {n.removeprefix("model."): (m.r["default"], m.scaling["default"]) for n, m in dora_layers(model).items()}
    assert found == {
        "layers.0.self_attn.q_proj": (2, 7 / 2),
        "layers.0.self_attn.v_proj": (1, 3 / 1),
        "layers.1.self_attn.q_proj": (4, 7 / 4),
        "layers.1.self_attn.v_proj": (1, 3 / 1),
    }


def test_rslora_scales_by_the_root_of_the_rank():
    model = get_peft_model(mlp(), config(use_rslora=True))
    assert {layer.scaling["default"] for layer in dora_layers(model).values()} == {3 / math.sqrt(2)}


@pytest.mark.parametrize(
    ("targets", "only", "expected"),
    [
        (["q_proj"], ["up_proj", "v_proj"], {"up_proj", "v_proj"}),
        (r".*\.q_proj", r".*\.(up|v)_proj", {"up_proj", "v_proj"}),
        # they take precedence
        (["q_proj", "up_proj"], ["up_proj"], {"up_proj"}),
        # target_modules: the architecture's default
        (None, ["up_proj"], {"up_proj"}),
        (["q_proj"], "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_magnitude_only_modules_train_m_alone(targets, only, expected):
    model = get_peft_model(llama(), config(target_modules=targets, magnitude_only_modules=only))
    same(output(model), output(llama()))
    model(IDS).logits.square().sum().backward()
    seen = set()
    for name, layer in dora_layers(model).items():
        short = name.rpartition(".")[2]
        lora_A, lora_B = layer.factor_parameters("default")
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.grad.abs().max() > 0, name
        if short in expected:
            seen.add(short)
            assert not lora_A.requires_grad
            assert not lora_B.requires_grad
            assert not lora_A.any()
            assert not lora_B.any()
        else:
            assert lora_B.grad.abs().max() > 0, name
    assert seen == expected
    # switching adapters must not set the zero factors free
    model.add_adapter("second", config(target_modules=["q_proj"]))
    model.set_adapter("second")
    model.set_adapter("default")
    for layer in dora_layers(model).values():
        only_m = layer.magnitude_only["default"]
        assert layer.factor_parameters("default")[0].requires_grad is not only_m
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_magnitude_vector["default"].weight.mul_(1.1)
    expected_output = output(model)
    differs(expected_output, output(llama()))
    model.merge_adapter()
    same(output(model), expected_output)


def test_injected_into_a_bare_module():
    model = inject_adapter_in_model(config(), mlp())
    same(output(model), output(mlp()))
    assert set(dora_layers(model)) == set(NAMES)
    train(model)
    differs(output(model), output(mlp()))
