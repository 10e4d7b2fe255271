"""What goes along with the weights."""

import json

import pytest
from huggingface_hub import constants

from dora_peft.adapters.export import companions as module
from dora_peft.adapters.export.companions import base_folder, check_inside, companions
from dora_peft.adapters.formats import UnreadableError

WANTED = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "merges.txt",
    "vocab.json", "qwen.tiktoken", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "generation_config.json", "LICENSE", "LICENSE.txt", "license.md", "NOTICE",
    "USE_POLICY.md",
]  # fmt: skip
UNWANTED = [
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt", "weights.pkl", "model.onnx", "README.md",
    "adapter_config.json", "trainer_state.json", "consolidated.00.pth", "tf_model.h5", "modeling_own.py",
    "tokenizer.model.pkl", "manifest.json", "dora_export.json",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in WANTED + UNWANTED:
        (base / name).write_text("{}")
    return base


def test_what_is_copied_and_what_is_not(folder):
    (folder / "original").mkdir()
    (folder / "vocabulary.json").mkdir()
    assert sorted(companions(folder, {})) == sorted(WANTED)


def test_named_chat_templates_lie_in_a_folder(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert "additional_chat_templates/tools.jinja" in companions(folder, {})


@pytest.mark.parametrize("of", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_own_code_goes_along_where_a_config_names_it(folder, of):
    (folder / of).write_text(json.dumps({"auto_map": {"AutoModel": "modeling_own.Own"}}))
    assert "modeling_own.py" in companions(folder, {})


def test_a_quantisation_is_described_only_where_there_is_one(folder):
    for name in ("quantize_config.json", "hf_quant_config.json"):
        (folder / name).write_text("{}")
    assert sorted(companions(folder, {})) == sorted(WANTED)
    assert "quantize_config.json" in companions(folder, {"quantization_config": {}})


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates"])
def test_a_link_that_leads_out_is_refused(folder, tmp_path, name):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.jinja").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret if name.startswith("add") else secret / "x.jinja")
    with pytest.raises(UnreadableError, match="leads out of its folder") as caught:
        companions(folder, {})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_within_the_hubs_cache_are_followed(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    blobs, snapshot = cache / "models--a--b" / "blobs", cache / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to(blobs / "0")
    with pytest.raises(UnreadableError):
        companions(snapshot, {})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert companions(snapshot, {})["tokenizer.json"].read_text() == "tokens"
    # a folder elsewhere has no business in the cache
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to(blobs / "0")
    with pytest.raises(UnreadableError):
        check_inside(folder / "vocab.json", folder)


def test_a_name_on_the_hub_brings_all_that_goes_along(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "local_folder", lambda name, patterns: asked.append((name, patterns)) or folder)
    assert base_folder(folder) == folder
    assert asked == []
    assert base_folder("owner/name@main") == folder
    ((name, patterns),) = asked
    assert name == "owner/name@main"
    assert {"*.safetensors", "*.json", "*.jinja", "LICENSE*", "*.py"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".pt", "*")) and "LICENSE" not in pattern for pattern in patterns[:3])
