"""The two functions of PEFT 0.20 that are patched there: for DoRA they save and load, for all else they are PEFT's."""

import peft
import pytest
import torch
from model_fixtures import config, mlp, output, same, train
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load

from dora_peft.plugin import peft_020

if hasattr(BaseTuner, "_get_adapter_state_dict"):
    pytest.skip("PEFT 0.21 and newer have methods of a tuner for the state dict", allow_module_level=True)

NAMES = ("get_peft_model_state_dict", "set_peft_model_state_dict")


@pytest.mark.parametrize("name", NAMES)
def test_every_module_that_has_the_function_has_the_patch_once(name):
    def original():
        return getattr(save_and_load, name)._dora_peft_original

    before = original()
    for module in (peft, peft.utils, peft.peft_model, save_and_load):
        assert getattr(module, name)._dora_peft_original is before
    peft_020.install()
    assert original() is before
    assert not hasattr(before, "_dora_peft_original")


@pytest.mark.parametrize("use_dora", [False, True])
def test_pefts_own_adapters_are_pefts_own(use_dora):
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"], bias="all", use_dora=use_dora))
    own = save_and_load.get_peft_model_state_dict._dora_peft_original(model)
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)
    again = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"], bias="all", use_dora=use_dora))
    train(model)
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    same(output(again.eval()), output(model))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_an_adapter_and_the_biases_that_it_trains_travel(bias):
    model = train(get_peft_model(mlp(), config(bias=bias)))
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    # down has none, and head no adapter
    assert len(biases) == {"none": 0, "lora_only": 1, "all": 2}[bias]
    with torch.no_grad():
        for parameter in biases.values():
            parameter.add_(1)
    saved = peft.get_peft_model_state_dict(model)
    # those that PEFT's own LoRA loses are among them
    assert {n for n in saved if n.endswith("bias")} == biases.keys()
    again = get_peft_model(mlp(), config(bias=bias)).eval()
    assert (output(again) - output(model)).abs().max() > 1e-3
    peft.set_peft_model_state_dict(again, saved)
    same(output(again), output(model))


def test_a_state_dict_that_is_given_is_what_is_saved():
    """As by DeepSpeed, which gathers it."""
    model = train(get_peft_model(mlp(), config(bias="all")))
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    own, found = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(model, state_dict=doubled)
    assert found.keys() == own.keys()
    assert {name.rpartition(".")[2] for name in own} >= {"weight", "bias"}
    for name in own:
        torch.testing.assert_close(found[name], 2 * own[name])


def test_the_adapter_that_is_named_is_meant():
    model = train(get_peft_model(mlp(), config()))
    model.add_adapter("second", config(r=3, target_modules=["up"]))
    train(model, "second", seed=3)
    saved = peft.get_peft_model_state_dict(model, adapter_name="second")
    assert {name.removeprefix("base_model.model.").partition(".")[0] for name in saved} == {"up"}
    assert {tuple(tensor.shape) for name, tensor in saved.items() if "lora_A" in name} == {(3, 6)}
    again = get_peft_model(mlp(), config())
    again.add_adapter("second", config(r=3, target_modules=["up"]))
    peft.set_peft_model_state_dict(again, saved, "second")
    for one in (model, again):
        one.set_adapter("second")
    same(output(again.eval()), output(model))
