"""transformers' own adapter methods: for DoRA they load, add and choose as PEFT's do, for others as before."""

import pytest
import torch
from checkpoint_fixtures import OPTIONS, differs, llama, output, same, save, train
from peft import LoraConfig, get_peft_model
from transformers import ConvNextConfig, ConvNextModel

from dora_peft import DoraConfig
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
