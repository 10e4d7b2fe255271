"""An exact export's adapter over another base than its own is found by `doctor`."""

import hashlib

import pytest
import torch
from export_fixtures import gpt2, wide_llama
from format_fixtures import llama, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dora_peft.adapters import doctor
from dora_peft.adapters.export import export
from dora_peft.adapters.export.fingerprint import KEY, digest_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_is_of_the_rows_in_their_dtype(dtype):
    matrix = torch.randn(5, 6).to(dtype)
    expected = hashlib.sha256(matrix.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest_of(matrix) == expected
    assert digest_of(matrix.T.contiguous().T) == expected


@pytest.mark.parametrize(("make", "targets"), [(llama, "all-linear"), (gpt2, ["c_attn", "c_proj", "wte"])])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_doctor_tells_the_base_from_others(tmp_path, make, targets):
    make().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", make(), target_modules=targets)
    record = export(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", "exact")
    adapter = tmp_path / "out" / "adapter"
    assert doctor(adapter, tmp_path / "out" / "base") == []
    assert doctor(adapter, AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")) == []
    (finding,) = doctor(adapter, tmp_path / "base")
    assert finding.name == "not-its-base"
    assert set(finding.modules) == record.modules.keys()
    assert "exact export" in finding.found
    # the dtype decides what is left of c
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.bfloat16)
    assert [one.name for one in doctor(adapter, other)] == ["not-its-base"]


def test_one_weight_that_was_changed_is_named(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", "exact")
    path = tmp_path / "out" / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    (finding,) = doctor(tmp_path / "out" / "adapter", tmp_path / "out" / "base")
    assert finding.modules == ("model.layers.0.mlp.up_proj",)


def test_a_base_of_codes(tmp_path):
    pytest.importorskip("bitsandbytes")
    wide_llama().save_pretrained(tmp_path / "floats")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", quantization_config=config, device_map="cpu"
    ).save_pretrained(tmp_path / "codes")  # fmt: skip
    saved(tmp_path / "adapter", wide_llama(), target_modules=["q_proj", "up_proj"])
    export(tmp_path / "adapter", tmp_path / "codes", tmp_path / "out", "exact", base_quantization="nf4")
    assert doctor(tmp_path / "out" / "adapter", tmp_path / "out" / "base") == []
    (finding,) = doctor(tmp_path / "out" / "adapter", tmp_path / "codes")
    assert (finding.name, len(finding.modules)) == ("not-its-base", 4)


def test_damaged_digests(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", "exact")
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert KEY in file.metadata()
    save_file(load_file(path), path, metadata={"format": "pt", KEY: "{"})
    assert [one.name for one in doctor(tmp_path / "out" / "adapter", tmp_path / "out" / "base")] == ["unreadable"]
