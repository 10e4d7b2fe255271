"""PEFT's own rules, by its private names."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig
from dora_peft.bases.peft_names import all_linear, in_out_features


def test_all_linear_names_what_pefts_lora_adapts():
    def llama():
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape))

    config = DoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = all_linear(llama(), config)
    lora = get_peft_model(llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert found == lora.peft_config["default"].target_modules
    assert not any("lm_head" in name for name in found)
    # asked of a copy
    assert config.target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Linear(5, 4), (5, 4)),
        (Conv1D(4, 5), (5, 4)),
        (nn.Conv2d(3, 6, 2), (3, 6)),
        (nn.Embedding(7, 4), (7, 4)),
    ],
)
def test_sizes(layer, sizes):
    assert in_out_features(layer) == sizes


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_an_unknown_layer_is_named():
    with pytest.raises(ValueError, match="found ReLU"):
        in_out_features(nn.ReLU())
