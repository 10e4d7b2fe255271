"""Which config class a folder gives."""

import peft
import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.plugin.configs import plain_peft_configs


def test_plain_peft_configs_is_left_again_after_an_error(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(6, 8)), DoraConfig(target_modules=["0"])).save_pretrained(tmp_path)

    def kind():
        return type(peft.PeftConfig.from_pretrained(str(tmp_path)))

    assert kind() is DoraConfig
    inside = []

    def fail():
        with plain_peft_configs():
            inside.append(kind())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert inside == [LoraConfig]
    assert kind() is DoraConfig
