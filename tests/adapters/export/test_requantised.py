"""What bitsandbytes makes of a base is what transformers' loading with quantization_config makes of it."""

import json

import pytest
import torch
from format_fixtures import llama, saved
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.requantised import NAMED, Quantised, recorded
from dora_peft.adapters.formats import Checkpoint, UnreadableError, read_source
from dora_peft.adapters.formats.base import skeleton
from dora_peft.bases import base_weight

DOUBLE = {**NAMED["nf4"], "bnb_4bit_use_double_quant": True}
SKIPPED = {**NAMED["nf4"], "llm_int8_skip_modules": ["lm_head", "q_proj"]}


def wide(turned):
    torch.manual_seed(0)
    if turned:
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    return Llama(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=32,
                             num_attention_heads=2))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("record", [NAMED["nf4"], NAMED["fp4"], DOUBLE, SKIPPED, NAMED["int8"]])
def test_it_is_that_of_transformers(tmp_path, record, turned, dtype):
    pytest.importorskip("bitsandbytes")
    model = wide(turned).to(dtype)
    model.save_pretrained(tmp_path)
    entries = {name: value for name, value in record.items() if name != "quant_method"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**entries), dtype=dtype, device_map="cpu"
    )
    expected = {
        path: base_weight(layer, path).dense()
        for path, layer in loaded.named_modules()
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    quantised = Quantised(record, skeleton(json.loads((tmp_path / "config.json").read_text())))
    assert quantised.paths == dict.fromkeys(expected, turned)
    assert len(expected) >= 4
    for path, dense in expected.items():
        weight = model.get_submodule(path).weight.detach()
        found = quantised.rounded(path, weight)
        assert found.shape == weight.shape
        assert torch.equal((found.t() if turned else found).float(), dense.float())
        assert not torch.equal(found, weight)


def test_norms_of_a_qdora_adapter_are_those_of_the_quantised_base(tmp_path):
    """A folder that says nf4 gives other scales than one that is told none."""
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"]["dora_peft"]["base_quantization"] = NAMED["nf4"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = "model.layers.0.mlp.up_proj"
    weights = {}
    for name in (None, "nf4", "none"):
        adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [folder], base_quantization=name)
        with adapted.at_hand(path) as layer:
            weights[name] = layer.scale("default").clone()
        kept = adapted.requantised("lm_head", llama().lm_head.weight.detach())
        assert torch.equal(kept, llama().lm_head.weight)
    assert torch.equal(weights[None], weights["nf4"])
    assert (weights["nf4"] / weights["none"] - 1).abs().max() > 1e-3


def test_what_folders_say(tmp_path):
    one, other = (read_source(saved(tmp_path / name)) for name in "ab")
    assert recorded([one, other], None) == (None, False)
    assert recorded([one], "int8") == (NAMED["int8"], False)
    other.config["auto_mapping"]["dora_peft"]["base_quantization"] = DOUBLE
    assert recorded([other, other], None) == (DOUBLE, False)
    with pytest.raises(UnreadableError, match="quantised in different ways"):
        recorded([one, other], None)
    other.config["auto_mapping"] = None
    assert recorded([one, other], None) == (None, True)
    with pytest.raises(UnreadableError, match="expected one of none, nf4, fp4, int8, found 'q8'"):
        recorded([one], "q8")


def test_other_methods_need_their_own_checkpoint():
    with pytest.raises(UnreadableError, match="quantised by gptq, and this base is not quantised"):
        Quantised({"quant_method": "gptq", "bits": 4}, wide(False))
