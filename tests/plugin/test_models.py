"""The patches of PeftModel leave models of other kinds as they are."""

import peft
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def test_the_error_of_a_damaged_lora_file_is_still_safetensors_own(tmp_path):
    get_peft_model(mlp(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SafetensorError, match=r"adapter_model\.safetensors"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_lora_models_keep_pefts_message_for_other_kinds():
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types") as caught:
        model.add_adapter("other", peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert "dora" not in str(caught.value).lower()
