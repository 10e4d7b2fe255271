"""The patches of PeftModel leave models of other kinds as they are."""

import peft
import pytest
import torch
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


def saved_pickle(folder, content):
    get_peft_model(mlp(), LoraConfig(target_modules=["0"])).save_pretrained(folder, safe_serialization=False)
    torch.save(content, folder / "adapter_model.bin")


def test_what_is_no_weight_of_an_adapter_is_none_of_ours(tmp_path):
    saved_pickle(tmp_path, {"step": 3, "other": torch.zeros(2)})
    assert peft.load_peft_weights(tmp_path)["step"] == 3
    saved_pickle(tmp_path, {"base_model.model.0.lora_A.weight": 3})
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*holds other things than tensors"):
        peft.load_peft_weights(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_no_damage(tmp_path):
    saved_pickle(tmp_path, {"base_model.model.0.lora_A.weight": torch.zeros(2)})
    torch_load = peft.utils.save_and_load.torch_load
    with pytest.raises(RuntimeError) as caught:
        torch_load(tmp_path / "adapter_model.bin", map_location="cuda:3")
    assert "damaged" not in str(caught.value)
