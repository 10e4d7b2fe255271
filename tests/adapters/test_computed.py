"""Saving, loading and merging adapters whose A, B or m are masked or parametrized, and hooks while merged."""

import json
import warnings

import pytest
import torch
from called_fixtures import COMPUTED, attach, leaves
from layer_fixtures import One, adapted, base_of, distance, dora, example
from model_fixtures import config, mlp, same, saved_second, train
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from dora_peft.plugin.configs import plain_peft_configs

KINDS = ["linear", "Conv1D", "embedding", "conv2d"]


def computed(kind, how, symbols="ABm", **options):
    model = adapted(kind, torch.float64, fan_in_fan_out=kind == "Conv1D", **options).double().eval()
    attach(dora(model), how, symbols)
    return model


@torch.no_grad()
def step(model):
    """As an optimizer's, after which hooks have not computed their weights yet."""
    for parameter in leaves(dora(model)).values():
        parameter.mul_(1.1).add_(0.01)


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_values_that_are_used(kind, how, tmp_path):
    model = computed(kind, how)
    x = example(model)
    model(x)
    step(model)
    model.save_pretrained(tmp_path / "at once")
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "after a pass")
    base = base_of(model)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("at once", "after a pass")]
    assert {key.rpartition("layer.")[2].removesuffix(".weight") for key in tensors[0]} in (
        {"lora_A", "lora_B", "lora_magnitude_vector"},
        {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"},
    )
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][key], rtol=1e-12, atol=1e-12)
    assert distance(PeftModel.from_pretrained(One(base), tmp_path / "at once").double().eval()(x), expected) < 1e-6
    with plain_peft_configs():
        theirs = PeftModel.from_pretrained(One(base), tmp_path / "at once").double().eval()
    assert json.loads((tmp_path / "at once" / "adapter_config.json").read_text())["use_dora"]
    assert distance(theirs(x), expected) < 1e-6


def test_an_average_of_masked_tensors_is_refused():
    model = computed("linear", "mask")
    state = {name: 0.5 * tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="lora_A is computed from other tensors"):
        get_peft_model_state_dict(model, state_dict=state)


@pytest.mark.parametrize("how", COMPUTED)
def test_loading_into_a_computed_tensor_is_refused(how, tmp_path):
    saved_second(tmp_path)
    model = train(get_peft_model(mlp(), config()))
    undo = COMPUTED[how](model.base_model.model.up.lora_A["default"], "weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for load in (
        lambda: set_peft_model_state_dict(model, tensors),
        lambda: model.load_adapter(str(tmp_path), "default"),
        lambda: model.hotswap_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"computed from|same tensors"):
            load()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    undo()
    set_peft_model_state_dict(model, tensors)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    same(model(x).detach(), PeftModel.from_pretrained(mlp(), tmp_path).eval()(x).detach())


@pytest.mark.parametrize("how", COMPUTED)
def test_loading_into_a_computed_embedding_is_refused(how, tmp_path):
    adapted("embedding", torch.float64).double().save_pretrained(tmp_path)
    model = computed("embedding", how)
    for load in (lambda: model.load_adapter(str(tmp_path), "default"), lambda: model.hotswap_adapter(str(tmp_path))):
        with pytest.raises(ValueError, match=r"Cannot load DoRA adapter.*computed from"):
            load()


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_takes_the_values_of_now(kind, how):
    model = computed(kind, how)
    x, original = example(model), dora(model).original_weight().detach().clone()
    model(x)
    step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    merged = model(x).detach()
    model.unmerge_adapter()
    assert torch.equal(dora(model).original_weight(), original)
    assert distance(merged, model(x).detach()) < 1e-12
    assert distance(model.merge_and_unload()(x), merged) < 1e-12


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"])
def test_merging_says_that_hooks_do_not_run(name):
    model = adapted("linear", lora_dropout=0.25).eval()
    handle = getattr(dora(model), name)["default"].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"do not run while an adapter is merged.*: layer"):
        model.merge_adapter()
    model.unmerge_adapter()
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
