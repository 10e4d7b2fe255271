"""Models are copied, pickled, created on the meta device and trained with gradient checkpointing."""

import copy
import io

import pytest
import torch
from model_fixtures import IDS, Mlp, config, differs, dora_layers, llama, mlp, output, same, saved_second, train
from peft import PeftModel, get_peft_model


def test_deepcopy_is_independent():
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    clone = copy.deepcopy(model)
    assert torch.equal(output(clone), expected)
    train(clone, seed=7)
    differs(output(clone), expected)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_torch_save_of_the_whole_model(merged):
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    if merged:
        model.merge_adapter()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    same(output(loaded), expected)
    loaded.unmerge_adapter()
    for name, layer in dora_layers(loaded).items():
        assert torch.equal(layer.get_base_layer().weight, mlp().get_submodule(name).weight)


def test_low_cpu_mem_usage_loads_to_the_same_outputs(tmp_path):
    expected = saved_second(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.is_meta for p in model.parameters())
    same(output(model), expected)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    same(output(model.eval()), expected)


def test_a_meta_base_gets_a_meta_adapter_that_can_be_filled():
    with torch.device("meta"):
        base = Mlp().double()
    model = get_peft_model(base, config())
    assert all(p.is_meta for p in model.parameters())
    filled = train(get_peft_model(mlp(), config()))
    model.load_state_dict(filled.state_dict(), assign=True)
    same(output(model.eval()), output(filled))


# transformers has renamed it in 5.23; the old name works from 5.0 on
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointing):
        model = get_peft_model(llama(), config(target_modules="all-linear"))
        train(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        same(found[name], gradient)
