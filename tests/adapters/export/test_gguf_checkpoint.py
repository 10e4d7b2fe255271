"""A .gguf as a base: its tensors are, bit for bit, the parameters that transformers makes of it."""

import sys
from pathlib import Path

import pytest
import torch
from gguf_fixtures import llama, loaded, other, qwen, save_gguf
from transformers import GPT2Config, GPT2LMHeadModel

from dora_peft.adapters.export.gguf_checkpoint import (
    GgufCheckpoint,
    checkpoint_of,
    is_gguf,
    loading_options,
)
from dora_peft.adapters.formats import Checkpoint, UnreadableError

# fetched by a script of ours, not part of the repository
SMOLLM2 = Path(__file__).parents[3] / "data" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=20)
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "llama": (llama, "llama"),
    "tied llama": (lambda: llama(True), "llama"),
    "qwen2": (qwen, "qwen2"),
    # transformers takes its default for the size of heads
    "qwen3": (lambda: other("qwen3", head_dim=128), "qwen3"),
    "gemma2": (lambda: other("gemma2"), "gemma2"),
    "gemma3": (lambda: other("gemma3_text"), "gemma3"),
    "phi3": (lambda: other("phi3", pad_token_id=0), "phi3"),
    "gpt2": (gpt2, "gpt2"),
}


def same(path):
    """Compare all parameters; how many the file has."""
    found, model = GgufCheckpoint(path), loaded(path)
    parameters = dict(model.named_parameters())
    assert found.entries.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert found.entries[key].shape == tuple(parameter.shape), key
        tensor = found.tensor(key)
        assert tensor.dtype == found.entries[key].dtype == torch.float32
        assert torch.equal(tensor, parameter), key
    return len(parameters)


@pytest.mark.parametrize("case", MODELS)
def test_its_tensors_are_transformers_parameters(tmp_path, case):
    make, architecture = MODELS[case]
    model = make()
    path = save_gguf(model, tmp_path / "model.gguf", architecture=architecture)
    assert same(path) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
def test_of_every_type_that_can_be_written(tmp_path, kind):
    path = save_gguf(llama(), tmp_path / "model.gguf", kind)
    same(path)
    found = GgufCheckpoint(path)
    assert {found.kind(key) for key, entry in found.entries.items() if len(entry.shape) == 2} == {kind}
    if kind == "F32":
        # nothing was lost, and so neither order nor names
        for key, value in llama().state_dict().items():
            assert torch.equal(found.tensor(key), value), key


@pytest.mark.slow
def test_of_a_real_file():
    if not SMOLLM2.exists():
        pytest.skip("there is no data/smollm2")
    assert same(SMOLLM2) == 272


def test_what_it_says(tmp_path):
    path = save_gguf(llama(True), tmp_path / "model.gguf")
    found = checkpoint_of(path)
    assert isinstance(found, GgufCheckpoint)
    assert found.files() == ["model.gguf"]
    assert found.folder == tmp_path
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert found.config["quantization_config"] == {"quant_method": "gguf", "gguf_file": "model.gguf"}
    assert found.config["tie_word_embeddings"] is True
    assert found.config["num_key_value_heads"] == 2
    assert "lm_head.weight" not in found.entries
    assert loading_options(found) == {"gguf_file": "model.gguf"}


def test_other_bases_are_safetensors(tmp_path):
    llama().save_pretrained(tmp_path)
    found = checkpoint_of(tmp_path)
    assert type(found) is Checkpoint
    assert loading_options(found) == {}
    assert not is_gguf(tmp_path)
    assert is_gguf(tmp_path / "x.gguf")


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UnreadableError, match="There is no file"):
        GgufCheckpoint(tmp_path / "none.gguf")
    path = save_gguf(llama(), tmp_path / "model.gguf")
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(UnreadableError, match=r"model\.gguf") as error:
            GgufCheckpoint(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole.replace(b"llama.attention.head_count", b"llama.attention.head_caunt"))
    found = GgufCheckpoint(path)
    with pytest.raises(UnreadableError, match="has None heads"):
        found.tensor("model.layers.0.self_attn.q_proj.weight")
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnreadableError, match="pip install gguf"):
        GgufCheckpoint(path)


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    """gemma's norms would be off by one if it were read as others are."""
    path = save_gguf(other("gemma"), tmp_path / "model.gguf", architecture="gemma")
    with pytest.raises(UnreadableError, match=r"transformers cannot read .* Name the base in safetensors"):
        GgufCheckpoint(path)
