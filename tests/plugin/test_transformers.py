"""transformers' own adapter methods: for DoRA they load, add and choose as PEFT's do, for others as before."""

import pytest
import torch
from checkpoint_fixtures import OPTIONS, differs, llama, output, same, save, train
from peft import LoraConfig, get_peft_model
from transformers import ConvNextConfig, ConvNextModel

from dora_peft import DoraConfig
from dora_peft.plugin import transformers as subject
from dora_peft.plugin.configs import plain_peft_configs

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


def test_transformers_own_adapter_methods(tmp_path):
    base = llama()
    base.add_adapter(DoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    same(output(base), output(llama()))
    train(base)
    expected = output(base)
    base.disable_adapters()
    same(output(base), output(llama()))
    base.enable_adapters()
    same(output(base), expected)
    assert base.active_adapters() == ["default"]
    base.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert type(again.peft_config["default"]) is DoraConfig
    same(output(again), expected)
    with pytest.warns(UserWarning, match="multiple adapters in the model"):
        again.add_adapter(DoraConfig(r=2, target_modules=["v_proj"]), "second")
    again.set_adapter("second")
    same(output(again), output(llama()))
    again.set_adapter("default")
    same(output(again), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transformers_load_adapter_with_and_without_this_package(options, tmp_path):
    if "modules_to_save" in options:
        pytest.skip("transformers does not load modules_to_save")
    ours = get_peft_model(llama(), DoraConfig(r=4, lora_alpha=6, **options))
    expected = output(train(ours))
    save(ours, tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    assert type(base.peft_config["default"]) is DoraConfig
    same(output(base), expected)
    with pytest.warns(UserWarning, match="multiple adapters in the model"):
        base.load_adapter(str(tmp_path), "second")
    base.set_adapter("second")
    same(output(base), expected)
    plain = llama()
    with plain_peft_configs():
        plain.load_adapter(str(tmp_path))
    assert type(plain.peft_config["default"]) is LoraConfig
    same(output(plain), expected)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_transformers_load_adapter_of_a_grouped_convolution(tmp_path):
    """Its magnitudes are rescaled for PEFT on saving; every way in has to undo that."""

    def convnext():
        torch.manual_seed(0)
        sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
        return ConvNextModel(ConvNextConfig(**sizes, initializer_range=0.3, layer_scale_init_value=1.0)).double().eval()

    @torch.no_grad()
    def features(model):
        pixels = torch.linspace(-1, 1, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32)
        return model(pixels).last_hidden_state

    ours = train(get_peft_model(convnext(), DoraConfig(r=8, target_modules=["dwconv"])))
    expected = features(ours)
    differs(expected, features(convnext()))
    save(ours, tmp_path)
    base = convnext()
    base.load_adapter(str(tmp_path))
    same(features(base), expected)


def test_an_adapter_of_another_size_is_refused_by_name(tmp_path):
    save(train(get_peft_model(llama(), DoraConfig(r=4, target_modules=["q_proj"]))), tmp_path)
    base = llama(hidden_size=48)
    with pytest.raises(ValueError, match=r"(?s)The adapter in '.*' does not fit the model.*trained on another base"):
        base.load_adapter(str(tmp_path))
    same(output(base), output(llama(hidden_size=48)))
    assert not any("lora_" in name for name, _ in base.named_parameters())


def test_an_unreadable_file_is_named(tmp_path):
    save(train(get_peft_model(llama(), DoraConfig(r=4, target_modules=["q_proj"]))), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"Cannot read adapter_model\.safetensors of .*save or download"):
        llama().load_adapter(str(tmp_path))


def test_a_model_without_dora_is_not_copied_for_an_undo(monkeypatch):
    """Neither adding, choosing nor deleting one of PEFT's own adapters goes through this package."""
    calls, right = [], subject.restored_on_failure
    monkeypatch.setattr(subject, "restored_on_failure", lambda *args, **kw: (calls.append(1), right(*args, **kw))[1])

    def go_through(base, config):
        base.add_adapter(config)
        base.set_adapter("default")
        base.delete_adapter("default")
        return len(calls)

    assert go_through(llama(), LoraConfig(r=2, target_modules=["q_proj"])) == 0
    # adding one chooses it as well
    assert go_through(llama(), DoraConfig(r=2, target_modules=["q_proj"])) == 4


def test_an_error_in_between_leaves_others_adapters_to_transformers(monkeypatch):
    """A LoRA model is left as transformers leaves it, a DoRA model as it was."""

    def added(config):
        base = llama()

        def fail(*_):
            raise RuntimeError("inside")

        with monkeypatch.context() as patch:
            patch.setattr(type(base), "set_adapter", fail)
            with pytest.raises(RuntimeError, match="inside"):
                base.add_adapter(config)
        return any("lora_" in name for name, _ in base.named_parameters())

    assert added(LoraConfig(r=2, target_modules=["q_proj"]))
    assert not added(DoraConfig(r=2, target_modules=["q_proj"]))
