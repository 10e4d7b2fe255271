"""PEFT's and transformers' helpers on DoRA models: rescaling, conversion, status reports."""

import peft
import pytest
import torch
from model_fixtures import (
    NAMES,
    config,
    dense,
    dense_output,
    differs,
    dora_layers,
    mlp,
    output,
    same,
    train,
    two_adapters,
)
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.helpers import rescale_adapter_scale


@pytest.mark.parametrize("factor", [0.0, 0.5, 2])
def test_rescaling_equals_a_model_of_that_scaling(factor):
    model = train(get_peft_model(mlp(), config()))
    before = output(model)
    other = train(get_peft_model(mlp(), config(lora_alpha=3 * factor)))
    with rescale_adapter_scale(model, factor):
        same(output(model), output(other))
        same(output(model), dense_output(model, ["default"]))
        differs(output(model), before)
    assert torch.equal(output(model), before)


def test_conversion_to_lora_at_full_rank_gives_the_merged_outputs(tmp_path):
    model = train(get_peft_model(mlp(), config()))
    expected = output(model)
    lora_config, tensors = peft.convert_to_lora(model, rank=6)
    assert lora_config.r == 6
    assert not lora_config.use_dora
    plain = get_peft_model(mlp(), lora_config)
    result = peft.set_peft_model_state_dict(plain, tensors)
    assert not result.unexpected_keys
    # "up" has rank 6 at most and is exact; "down" (8 x 10) is cut at 6
    layer = plain.base_model.model.up
    torch.testing.assert_close(
        layer.base_layer.weight + layer.get_delta_weight("default"), dense(dora_layers(model)["up"], ["default"]),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="This LoRA has ranks from 6 to 8"):
        peft.save_as_lora(tmp_path, model, rank=1.0)
    whole = PeftModel.from_pretrained(mlp(), tmp_path).eval()
    assert type(whole.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(output(whole), expected, rtol=1e-5, atol=1e-5)


def test_status_reports():
    model = two_adapters()
    status = get_model_status(model)
    assert status.peft_types == {"default": "DORA", "second": "DORA"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.num_adapter_layers == len(NAMES)
    assert {layer.name for layer in get_layer_status(model)} == {f"model.{n}" for n in NAMES}
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
