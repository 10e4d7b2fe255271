"""Initialisations that change the base (PiSSA, OLoRA) are converted on saving."""

import pytest
import torch
from checkpoint_fixtures import differs, load_ours, load_plain, net, output, save, train
from peft import get_peft_model
from safetensors.torch import load_file

from dora_peft import DoraConfig

# PEFT says both, in its own tuner and where it creates the factors of ours
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    # PEFT 0.20 only: it looks for the config of a base model without a name
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]


# PEFT 0.20 only: it loads the initial adapter beside the trained one to subtract it
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_conversion_of_a_mutated_base_keeps_the_magnitude(init, tmp_path):
    """The base loses s B0 A0 at the start; the converted adapter gives the same outputs on the untouched base."""

    # PEFT initialises these in float32 and below only
    def base():
        return net().float()

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    config = DoraConfig(r=3, lora_alpha=4, target_modules=["linear", "no_bias"], init_lora_weights=init)
    ours = get_peft_model(base(), config).eval()
    close(output(ours), output(base()))
    layer = ours.base_model.model.linear
    differs(layer.get_base_layer().weight, base().linear.weight)
    # PEFT's documentation: so that loading the initial adapter does not start again
    config.init_lora_weights = True
    save(ours, tmp_path / "initial")
    config.init_lora_weights = init
    expected = output(train(ours))
    differs(expected, output(base()))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone()
    save(ours, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    tensors = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.linear.lora_magnitude_vector.weight"], magnitude)
    close(output(load_ours(base(), tmp_path / "converted")), expected)
    close(output(load_plain(base(), tmp_path / "converted")), expected)
    # the model in hand goes on as it was
    assert torch.equal(output(ours), expected)
