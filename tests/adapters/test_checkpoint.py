"""What is saved loads in plain PEFT to the same outputs, and what PEFT saves loads here."""

from dataclasses import asdict

import pytest
import torch
from checkpoint_fixtures import (
    OPTIONS,
    differs,
    llama,
    load_ours,
    load_plain,
    net,
    output,
    same,
    save,
    train,
    zero_net,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dora_peft import DoraConfig

# PEFT says both, in its own tuner and where it creates the factors of ours
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    # PEFT 0.20 only: it looks for the config of a base model without a name
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]


KINDS = ["linear", "no_bias", "transposed", "conv1d", "conv2d", "conv3d", "embed", "grouped"]


@pytest.mark.parametrize("key", ["weight", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_in_plain_peft_and_back(kind, key, tmp_path):
    ours = get_peft_model(net(), DoraConfig(r=4, lora_alpha=6, target_modules=[kind], magnitude_key=key))
    expected = output(train(ours))
    differs(expected, output(net()))
    save(ours, tmp_path)
    same(output(load_plain(net(), tmp_path)), expected)
    same(output(load_ours(net(), tmp_path)), expected)


@pytest.mark.parametrize(
    ("key", "suffix"), [("weight", ".lora_magnitude_vector.weight"), ("peft", ".lora_magnitude_vector")]
)
def test_the_spelling_of_the_magnitudes_key(key, suffix, tmp_path):
    ours = get_peft_model(net(), DoraConfig(r=2, target_modules=["linear"], magnitude_key=key))
    save(ours, tmp_path)
    names = {n for n in load_file(tmp_path / "adapter_model.safetensors") if "magnitude" in n}
    assert names == {f"base_model.model.linear{suffix}"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_llama_in_plain_peft_and_back(options, tmp_path):
    ours = get_peft_model(llama(), DoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    expected = output(train(ours))
    differs(expected, output(llama()))
    save(ours, tmp_path)
    same(output(load_plain(llama(), tmp_path)), expected)
    again = load_ours(llama(), tmp_path)
    same(output(again), expected)
    before, after = asdict(ours.peft_config["default"]), asdict(again.peft_config["default"])
    for entry in ("inference_mode", "peft_version"):
        before.pop(entry), after.pop(entry)
    assert before == after


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_travel(bias, tmp_path):
    ours = get_peft_model(net(), DoraConfig(r=2, target_modules=["linear", "conv1d"], bias=bias))
    with torch.no_grad():
        moved = [p.add_(1) for n, p in ours.named_parameters() if n.endswith("bias") and p.requires_grad]
    assert len(moved) == (7 if bias == "all" else 2)
    expected = output(train(ours))
    save(ours, tmp_path)
    same(output(load_plain(net(), tmp_path)), expected)
    same(output(load_ours(net(), tmp_path)), expected)


def test_trained_tokens_travel(tmp_path):
    config = DoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5], task_type="CAUSAL_LM")
    ours = train(get_peft_model(llama(), config))
    expected = output(ours)
    save(ours, tmp_path)
    same(output(load_ours(llama(), tmp_path)), expected)
    same(output(load_plain(llama(), tmp_path)), expected)


def test_auto_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    ours = train(get_peft_model(base, DoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    save(ours, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is DoraConfig
    same(output(loaded.eval()), output(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_are_written_in_full_precision(dtype, tmp_path):
    ours = get_peft_model(net().to(dtype), DoraConfig(r=2, target_modules=["linear"]))
    expected = output(train(ours))
    save(ours, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    same(output(load_ours(net().to(dtype), tmp_path)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_pefts_loads_here(kind, tmp_path):
    theirs = get_peft_model(net(), LoraConfig(r=4, lora_alpha=6, target_modules=[kind], use_dora=True))
    expected = output(train(theirs))
    differs(expected, output(net()))
    save(theirs, tmp_path)
    config = DoraConfig.from_pretrained(str(tmp_path))
    ours = load_ours(net(), tmp_path, config=config)
    same(output(ours), expected)
    # unmarked, so without asking for DoraConfig it stays PEFT's
    assert type(PeftModel.from_pretrained(net(), tmp_path).peft_config["default"]) is LoraConfig
    # into a model that is already DoRA it comes as DoRA
    ours.load_adapter(tmp_path, "second")
    assert type(ours.peft_config["second"]) is DoraConfig
    ours.set_adapter("second")
    same(output(ours.eval()), expected)


def test_an_adapter_of_pefts_loads_into_a_dora_llama(tmp_path):
    options = {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    theirs = get_peft_model(llama(), LoraConfig(use_dora=True, task_type="CAUSAL_LM", **options))
    expected = output(train(theirs))
    save(theirs, tmp_path)
    ours = get_peft_model(llama(), DoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = output(train(ours, seed=3))
    ours.load_adapter(tmp_path, "second")
    same(output(ours), before)
    ours.set_adapter("second")
    same(output(ours.eval()), expected)
    # outside of that call PEFT's folders are read as before
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig


def test_pefts_adapter_goes_back_to_peft(tmp_path):
    # PEFT writes one fan_in_fan_out for all layers
    kinds = [kind for kind in KINDS if kind != "transposed"]
    theirs = get_peft_model(net(), LoraConfig(r=4, target_modules=kinds, use_dora=True))
    expected = output(train(theirs))
    save(theirs, tmp_path / "theirs")
    ours = load_ours(net(), tmp_path / "theirs", config=DoraConfig.from_pretrained(str(tmp_path / "theirs")))
    save(ours, tmp_path / "ours")
    same(output(load_plain(net(), tmp_path / "ours")), expected)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_checkpoint_of_both_spellings_loads(metadata, tmp_path):
    ours = get_peft_model(net(), DoraConfig(r=2, target_modules=["linear", "no_bias"]))
    expected = output(train(ours))
    save(ours, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    bare = "base_model.model.no_bias.lora_magnitude_vector"
    tensors[bare] = tensors.pop(f"{bare}.weight")
    save_file(tensors, file, metadata=metadata)
    same(output(load_ours(net(), tmp_path)), expected)


def test_a_pickled_checkpoint(tmp_path):
    ours = get_peft_model(net(), DoraConfig(r=2, target_modules=["linear"]))
    expected = output(train(ours))
    save(ours, tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    same(output(load_ours(net(), tmp_path)), expected)


def test_saving_does_not_change_the_model(tmp_path):
    ours = train(get_peft_model(zero_net("linear"), DoraConfig(r=4, target_modules=["linear", "grouped"])))
    expected = output(ours)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    save(ours, tmp_path)
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(output(ours), expected)


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    ours = train(get_peft_model(zero_net("linear"), DoraConfig(r=4, target_modules=["linear", "conv2d"])))
    save(ours, tmp_path / "unmerged")
    ours.merge_adapter()
    save(ours, tmp_path / "merged")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("unmerged", "merged"))
    assert first.keys() == second.keys()
    for key in first:
        same(second[key], first[key])
