"""Adapters of any format are loaded over a base on the meta device, and what would be another adapter is refused."""

import json

import pytest
import torch
from export_fixtures import gpt2
from format_fixtures import llama, saved, shaken
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from dora_peft import DoraConfig
from dora_peft.adapters import convert
from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.loading import plain_path
from dora_peft.adapters.formats import Checkpoint, UnreadableError

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 32, "num_attention_heads": 2}


def test_an_adapter_of_another_tool(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "kohya", "lycoris")
    merged = PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload().state_dict()
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [tmp_path / "kohya"])
    for path in adapted.layers:
        torch.testing.assert_close(adapted.merged(path), merged[f"{path}.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("plain LoRA", "is no DoRA: module .* has no magnitude"),
        ("another base", "is another base"),
        ("pissa", "changes the base's weights whenever it is loaded"),
        ("replicated", "layer_replication"),
        ("no class", "names no model of transformers"),
        ("resized", "the vocabulary was resized"),
    ],
)
def test_what_cannot_be_exported(tmp_path, change, said):
    llama().save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter", **({"target_modules": ["embed_tokens"]} if change == "resized" else {}))
    config = json.loads((folder / "adapter_config.json").read_text())
    if change == "plain LoRA":
        folder = tmp_path / "lora"
        shaken(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(folder)
    elif change == "another base":
        gpt2().save_pretrained(tmp_path / "base2")
        with pytest.raises(UnreadableError, match=said):
            AdaptedBase(Checkpoint(tmp_path / "base2"), [folder])
        return
    elif change == "no class":
        base = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**base, "architectures": ["Nobody"]}))
    elif change == "resized":
        tensors = load_file(folder / "adapter_model.safetensors")
        key = next(key for key in tensors if key.endswith("embed_tokens.base_layer.weight") or "embed_tokens.w" in key)
        tensors[key] = torch.zeros(34, 24)
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        more = {"init_lora_weights": "pissa"} if change == "pissa" else {"layer_replication": [[0, 1], [0, 2]]}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(UnreadableError, match=said):
        AdaptedBase(Checkpoint(tmp_path / "base"), [folder])


def test_paths_without_wrappers():
    assert plain_path("model.embed_tokens.token_adapter.base_layer") == "model.embed_tokens"
    assert plain_path("lm_head") == "lm_head"


def classifier(folder, **options):
    """A classifier's folder, and an adapter's over it, whose head PEFT trains along."""
    torch.manual_seed(0)
    kind = LlamaForSequenceClassification
    kind(LlamaConfig(**SMALL, pad_token_id=0)).save_pretrained(folder / "base")
    return saved(folder / "adapter", kind.from_pretrained(folder / "base"), task_type="SEQ_CLS", **options)


def test_a_head_that_the_base_s_class_has_not(tmp_path):
    folder = classifier(tmp_path)
    AdaptedBase(Checkpoint(tmp_path / "base"), [folder])
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "other")
    with pytest.raises(UnreadableError, match=r"holds a 'score.*weight', and .* is of a class without one: \['LlamaFo"):
        AdaptedBase(Checkpoint(tmp_path / "other"), [folder])


def test_an_adapter_of_the_model_without_a_head(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter", LlamaModel.from_pretrained(tmp_path / "base"), target_modules=["q_proj"])
    with pytest.raises(UnreadableError, match=r"has nothing for 'model.layers.0.self_attn.q_proj.lora_A.default"):
        AdaptedBase(Checkpoint(tmp_path / "base"), [folder])


def test_biases_beside_a_head_trained_in_full(tmp_path):
    """bias="all" has PEFT save the head's bias twice more, under its wrapper's names."""
    config = BertConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=1, vocab_size=32, num_attention_heads=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        BertForSequenceClassification.from_pretrained(tmp_path / "base"),
        DoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    trained = AdaptedBase(Checkpoint(tmp_path / "base"), [tmp_path / "adapter"]).trained()
    assert {"classifier.bias", "classifier.weight", "bert.encoder.layer.0.attention.self.query.bias"} <= trained.keys()
    for name, own in trained.items():
        assert torch.equal(own.value, expected[name])
        assert own.alone == name.startswith("classifier.")
