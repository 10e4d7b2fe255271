"""Whole models are merged, unmerged and unloaded."""

import pytest
import torch
from model_fixtures import config, dense_output, dora_layers, llama, mlp, output, same, train, two_adapters, unchanged
from peft import get_peft_model
from transformers import LlamaForCausalLM

MERGES = [{}, {"safe_merge": True}, {"offload_original": True}]


@pytest.mark.parametrize("options", MERGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_and_unmerge_restore_every_bit(options, dtype):
    model = get_peft_model(llama().to(dtype), config(target_modules="all-linear"))
    train(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    expected = output(model)
    model.merge_adapter(**options)
    assert not unchanged(model, before)
    if dtype == torch.float64:
        same(output(model), expected)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert torch.equal(output(model), expected)
    # optimizers and sharders hold on to the parameters themselves
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def test_merged_rows_have_the_magnitude_as_norm():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    for layer in dora_layers(model).values():
        weight = layer.get_base_layer().weight
        same(weight.norm(dim=1), layer.lora_magnitude_vector["default"].weight.detach().abs())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_untied_with_a_warning_and_tied_again(target):
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="tie"):
        # PEFT's own, at creation
        model = get_peft_model(base, config(target_modules=[target]))
    train(model)
    # the magnitude of the padding token's zero row follows its norm from here
    expected = output(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"unties module '[\w.]*{target}'"):
        model.merge_adapter()
    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    first, second = (getattr(t, "base_layer", t).weight for t in tables)
    assert first is not second
    same(output(model), expected)
    model.unmerge_adapter()
    first, second = (getattr(t, "base_layer", t).weight for t in tables)
    assert first is second
    assert unchanged(model, before)


def test_merge_and_unload_returns_a_plain_model():
    model = train(get_peft_model(llama(), config(target_modules="all-linear")))
    expected = output(model)
    plain = model.merge_and_unload()
    assert isinstance(plain, LlamaForCausalLM)
    assert not dora_layers(plain)
    assert plain.state_dict().keys() == llama().state_dict().keys()
    same(output(plain), expected)


def test_merge_and_unload_of_chosen_adapters():
    model = two_adapters()
    expected = dense_output(model, ["second"])
    same(output(model.merge_and_unload(adapter_names=["second"])), expected)


def test_unload_returns_the_base():
    model = train(get_peft_model(llama(), config(target_modules="all-linear")))
    plain = model.unload()
    assert unchanged(plain, llama().state_dict())


def test_safe_merge_refuses_a_broken_adapter_before_touching_the_base():
    model = train(get_peft_model(mlp(), config()))
    layer = dora_layers(model)["down"]
    with torch.no_grad():
        layer.lora_B["default"].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default.*down"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, mlp().down.weight)
    assert not layer.merged


def test_an_adapter_added_while_another_is_merged_starts_from_the_base():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    for layer in dora_layers(model).values():
        layer.update_layer("second", r=3, lora_alpha=3, config=config())
        assert layer.merged
    model.unmerge_adapter()
    for name, layer in dora_layers(model).items():
        same(layer.lora_magnitude_vector["second"].weight.detach(), mlp().get_submodule(name).weight.norm(dim=1))


def test_adding_an_adapter_to_a_merged_model_unmerges_it():
    """PEFT activates adapters of unmerged models only, and says so."""
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config(r=3))
    assert torch.equal(output(model), expected)
    model.set_adapter("second")
    same(output(model), output(mlp()))


def test_merging_twice_warns_and_changes_nothing():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    merged = output(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(output(model), merged)


def test_unmerging_what_is_not_merged_changes_nothing():
    model = train(get_peft_model(mlp(), config()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.unmerge_adapter()
    assert unchanged(model, before)


def test_a_merged_model_moves_and_casts_with_its_original():
    model = train(get_peft_model(mlp(), config()))
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    for name, layer in dora_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, mlp().get_submodule(name).weight.float())


def test_replicated_layers_have_adapters_of_their_own_and_merge_apart():
    model = get_peft_model(llama(), config(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]))
    train(model)
    layers = list(dora_layers(model).values())
    assert len(layers) == 4
    assert layers[0].base_layer.weight is layers[2].base_layer.weight
    assert layers[0].lora_A["default"].weight is not layers[2].lora_A["default"].weight
    expected = output(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="unties module"):
        model.merge_adapter()
    same(output(model), expected)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert layers[0].base_layer.weight is layers[2].base_layer.weight
