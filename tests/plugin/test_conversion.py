"""peft.convert_to_lora on DoRA models: what it writes loads to the same outputs, and says who reads its patterns."""

import json
import warnings

import peft
import pytest
import torch
from layer_fixtures import adapted
from model_fixtures import config, llama, mlp, output, train
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from dora_peft import plugin

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "list": TARGETS,
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*(q|o)_proj"},
    "magnitude-only": TARGETS | {"magnitude_only_modules": ["v_proj"]},
    "magnitude-only beside an expression": {"target_modules": r".*q_proj", "magnitude_only_modules": ["v_proj"]},
    "patterns": TARGETS | {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    "layers": TARGETS | {"layers_to_transform": [0], "layers_pattern": "layers"},
    "replicated layers": TARGETS | {"layer_replication": [[0, 2], [1, 2]]},
    "whole module": TARGETS | {"modules_to_save": ["lm_head"]},
}
# the larger side of no adapted matrix, but not below the smaller one
WHOLE = 16


def base():
    return llama(num_key_value_heads=4)


def trained(**options):
    model = get_peft_model(base(), config(**options))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model)
    with torch.no_grad():
        # A and B of magnitude-only modules are no parameters that training moves
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.copy_(frozen[name])
            elif "modules_to_save" in name:
                parameter.mul_(1.5)
    return model


def loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(base(), folder).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    return output(model)


# what a share warns of is asked for below
@pytest.mark.filterwarnings("ignore:This LoRA has ranks from")
@pytest.mark.parametrize("rank", [WHOLE, 1.0])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_the_whole_change_loads_to_the_same_outputs(options, rank, tmp_path):
    model = trained(**options)
    expected = output(model)
    with model.disable_adapter():
        update = (output(model) - expected).norm()
    peft.save_as_lora(tmp_path, model, rank=rank)
    # PEFT sums squares in fp32: a share of 1.0 leaves out what is below 2^-24 of the sum
    assert (loaded(tmp_path) - expected).norm() < (1e-5 if rank == WHOLE else 3e-3) * update


def test_a_share_is_less_than_the_whole(tmp_path):
    model = trained(**TARGETS)
    expected = output(model)
    with model.disable_adapter():
        update = (output(model) - expected).norm()
    errors = []
    for rank in (0.5, 0.99, 1.0):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This LoRA has ranks from")
            peft.save_as_lora(tmp_path / str(rank), model, rank=rank)
        errors.append(float((loaded(tmp_path / str(rank)) - expected).norm() / update))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("options", [TARGETS, CONFIGS["expression"]], ids=["list", "expression"])
def test_one_rank_is_read_alike_by_all(options, recwarn):
    """llama.cpp scales by lora_alpha / rank of the tensor, SGLang by lora_alpha / r of the config: both are 1."""
    lora_config, tensors = peft.convert_to_lora(trained(**options), rank=4)
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    assert ranks == {4} == {lora_config.r, lora_config.lora_alpha}
    assert {*lora_config.rank_pattern.values(), *lora_config.alpha_pattern.values()} <= {4}
    assert not lora_config.use_rslora
    assert [str(w.message) for w in recwarn if "ranks" in str(w.message)] == []


def test_a_share_says_who_reads_its_patterns(tmp_path):
    model = trained(**CONFIGS["all-linear"])
    with pytest.warns(UserWarning, match="This LoRA has ranks from") as caught:
        peft.save_as_lora(tmp_path, model, rank=0.9)
    (said,) = [str(w.message) for w in caught if "This LoRA" in str(w.message)]
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values()
    assert f"ranks from {min(ranks)} to {max(ranks)}" in said
    assert f"llama.cpp knows no patterns and scales by lora_alpha / rank of the tensor, 1/{max(ranks)} instead" in said
    assert "SGLang takes r and lora_alpha for all modules" in said
    assert "PEFT and vLLM read these" in said
    assert "--as lora" in said


def test_an_adapter_of_fewer_modules_than_another(tmp_path):
    model = trained(**TARGETS)
    model.add_adapter("second", config(target_modules=["v_proj"]))
    train(model, "second", seed=2).set_adapter("second")
    expected = output(model)
    peft.save_as_lora(tmp_path, model, rank=WHOLE, adapter_name="second")
    found = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(output(found), expected, rtol=1e-4, atol=1e-4)
    adapted_modules = {name.split(".lora_")[0].rpartition(".")[2] for name in found.state_dict() if "lora_" in name}
    assert adapted_modules == {"v_proj"}


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d"])
def test_other_layers_than_linear_ones_are_refused(kind):
    """PEFT would write an embedding under keys of a linear layer, and the stack of a kernel's positions."""
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*dora_peft"):
        peft.convert_to_lora(adapted(kind), rank=2)


def test_models_of_others_are_left_alone(recwarn):
    plain = get_peft_model(mlp(), peft.LoHaConfig(r=2, target_modules=["up", "down"], init_weights=False))
    lora_config, _ = peft.convert_to_lora(plain, rank=0.9)
    assert lora_config.rank_pattern
    assert [str(w.message) for w in recwarn if "This LoRA" in str(w.message)] == []


def test_layers_without_a_config():
    """Of inject_adapter_in_model, which has no place for one."""
    model = inject_adapter_in_model(config(), mlp())
    train(model)
    lora_config, tensors = peft.convert_to_lora(model, rank=6)
    assert lora_config.r == 6
    assert len(tensors) == 4


def test_registering_again_does_not_warn_twice():
    plugin.register()
    with pytest.warns(UserWarning, match="This LoRA has ranks from") as caught:
        peft.convert_to_lora(trained(**TARGETS), rank=0.9)
    assert len([w for w in caught if "This LoRA" in str(w.message)]) == 1
