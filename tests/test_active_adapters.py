"""Adapters are added, switched, used together, disabled and deleted."""

import copy
import sys

import pytest
import torch
from model_fixtures import (
    IDS,
    NAMES,
    X,
    adapter_parameters,
    config,
    dense,
    dense_output,
    differs,
    dora_layers,
    llama,
    mlp,
    output,
    same,
    train,
    two_adapters,
)
from peft import get_peft_model


def test_a_new_adapter_changes_nothing():
    model = get_peft_model(mlp(), config())
    same(output(model), output(mlp()))
    model.add_adapter("second", config(init_lora_weights="gaussian"))
    model.set_adapter("second")
    same(output(model), output(mlp()))


def test_set_adapter_switches_outputs_and_gradients():
    model = two_adapters()
    first = output(model)
    same(first, dense_output(model, ["default"]))
    model.set_adapter("second")
    same(output(model), dense_output(model, ["second"]))
    differs(output(model), first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model, "second"))
    model.set_adapter("default")
    assert torch.equal(output(model), first)


def test_a_second_adapter_is_not_trained_until_it_is_active():
    model = two_adapters()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "default"))


def test_disabled_adapters_leave_the_base():
    model = two_adapters()
    adapted = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(mlp()))
    assert torch.equal(output(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), output(mlp()))


def test_disabling_is_undone_by_an_error_inside():
    model = train(get_peft_model(mlp(), config()))
    adapted = output(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(output(model), adapted)


def test_delete_an_inactive_adapter():
    model = two_adapters()
    before = output(model)
    model.delete_adapter("second")
    assert torch.equal(output(model), before)
    assert not adapter_parameters(model, "second")
    assert list(model.peft_config) == ["default"]
    for layer in dora_layers(model).values():
        held = [getattr(layer, n) for n in (*layer.adapter_layer_names, *layer.other_param_names)]
        assert not any("second" in attribute for attribute in held)
        assert "second" not in layer._norms


def test_delete_the_active_adapter():
    model = two_adapters()
    model.set_adapter("second")
    expected = output(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default"):
        model.delete_adapter("default")
    assert all(layer.active_adapters == ["second"] for layer in dora_layers(model).values())
    assert torch.equal(output(model), expected)


def test_delete_the_last_adapter_leaves_the_base():
    model = train(get_peft_model(mlp(), config()))
    model.delete_adapter("default")
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert torch.equal(output(model.base_model), output(mlp()))


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
@pytest.mark.parametrize("base", [mlp, llama])
def test_several_active_adapters_agree_in_training_evaluation_and_merging(base, order):
    targets = {"target_modules": list(NAMES) if base is mlp else ["q_proj", "up_proj"]}
    model = two_adapters(base, **targets)
    model.base_model.set_adapter(order)
    evaluated = output(model)
    trained = output(model.train())
    same(trained, evaluated)
    if base is mlp:
        same(evaluated, dense_output(model, order))
    model.eval().merge_adapter(order)
    same(output(model), evaluated)
    for layer in dora_layers(model).values():
        same(layer.get_base_layer().weight, dense(layer, order))
    model.unmerge_adapter()
    same(output(model), evaluated)


def test_adapters_merged_one_after_the_other_compose_alike():
    model = two_adapters()
    together = copy.deepcopy(model)
    together.merge_adapter(["default", "second"])
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert torch.equal(output(model), output(together))
    model.unmerge_adapter()
    for name in NAMES:
        assert torch.equal(dora_layers(model)[name].get_base_layer().weight, mlp().get_submodule(name).weight)


def test_several_active_adapters_train_together():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    model.train()(X).square().sum().backward()
    for adapter in ("default", "second"):
        for name, parameter in adapter_parameters(model, adapter).items():
            assert parameter.grad.abs().max() > 0, name


def test_several_active_adapters_refuse_the_papers_dropout_by_name():
    model = two_adapters(dropout_mode="paper", lora_dropout=0.5)
    with pytest.raises(ValueError, match=r"Adapter 'default' uses dropout_mode='paper'.*dropout_mode='branch'"):
        model.base_model.set_adapter(["default", "second"])


def calls_of_a_training_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    calls = []

    def step():
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()

    # what is done once
    for _ in range(2):
        step()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        step()
    finally:
        sys.setprofile(before)
    return len(calls)


def test_a_training_step_does_not_look_at_idle_adapters():
    alone, among_others = (get_peft_model(llama(), config(target_modules="all-linear")).train() for _ in range(2))
    for number in range(5):
        among_others.add_adapter(f"idle{number}", config(target_modules="all-linear"))
    assert 1000 < calls_of_a_training_step(alone) == calls_of_a_training_step(among_others)
