"""What each route says of its rounding, and what it does over quantised bases and over what is there."""

import json

import pytest
import torch
from export_fixtures import outputs, wide_llama
from format_fixtures import saved, shaken
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import dora_peft
from dora_peft import DoraConfig
from dora_peft.adapters.export import export

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT = {"load_in_8bit": True}


def test_rounding_is_said(folders):
    """bf16 loses more than fp16, and the nearest LoRA of rank 1 most."""
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        for route in ("exact", "merged"):
            done = export(folders / "adapter", folders / "base", folders / "out", route, dtype=dtype, dry_run=True)
            errors[route, dtype] = done.totals["error_over_update"]
    for route in ("exact", "merged"):
        assert 4 < errors[route, torch.bfloat16] / errors[route, torch.float16] < 16
    one = export(folders / "adapter", folders / "base", folders / "out", "lora", rank=1, dry_run=True)
    assert one.totals["error_over_update"] > errors["exact", torch.float16]
    assert any("error / update is above 1%" in said for said in one.warnings())


def test_llama_cpp_s_file(folders):
    pytest.importorskip("gguf")
    export(folders / "adapter", folders / "base", folders / "out.gguf", "lora", rank=8, to="gguf")
    assert (folders / "out.gguf").read_bytes()[:4] == b"GGUF"


def test_a_lora_for_a_quantised_base_says_so(tmp_path):
    """Its config names the base in floating point, to which the update does not lead."""
    pytest.importorskip("bitsandbytes")
    wide_llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", wide_llama())
    record = export(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", "lora", rank=64, base_quantization="nf4")
    assert any("serve it over that quantised base" in note for note in record.notes)


@pytest.fixture(scope="module", params=[FOUR, EIGHT], ids=["nf4", "int8"])
def quantised(request, tmp_path_factory):
    """A base before and after bitsandbytes, an adapter trained over it, its logits and W' of one module."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantised")
    wide_llama().save_pretrained(folder / "floats")

    def base():
        config = BitsAndBytesConfig(**request.param)
        return AutoModelForCausalLM.from_pretrained(
            folder / "floats", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    base().save_pretrained(folder / "codes")
    shaken(get_peft_model(base(), DoraConfig(r=4, target_modules="all-linear"))).save_pretrained(folder / "adapter")
    model = PeftModel.from_pretrained(base(), folder / "adapter").eval()
    with torch.no_grad(), dora_peft.implementation("torch"):
        return folder, model(torch.arange(10)[None]).logits.float()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge")
@pytest.mark.parametrize("route", ["exact", "merged"])
@pytest.mark.parametrize("base", ["floats", "codes"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_quantised_bases(tmp_path, quantised, base, route, dequantize):
    """Of codes as of the floats that were quantised in training; only an exact export of codes has codes."""
    folder, expected = quantised
    more = {"dequantize": True} if dequantize and route == "exact" else {}
    record = export(folder / "adapter", folder / base, tmp_path / "out", route, dtype=torch.float32, **more)
    assert record.totals["error_over_update"] < 1e-5
    found = outputs(tmp_path / "out", route)
    # bitsandbytes' own products on a CPU round to 16 bits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    config = json.loads((tmp_path / "out" / ("base" if route == "exact" else "") / "config.json").read_text())
    keeps = base == "codes" and route == "exact" and not dequantize
    assert ("quantization_config" in config) == keeps
    if keeps:
        assert not config["quantization_config"].get("bnb_4bit_use_double_quant")
    assert (len(record.notes) == 1) == (base == "floats")


def test_a_base_that_is_quantised_otherwise_than_in_training(quantised):
    folder, _ = quantised
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    other = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "load_in_8bit": False}
    config["auto_mapping"]["dora_peft"]["base_quantization"] = other
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "other" / "adapter_model.safetensors").write_bytes(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    (note,) = export(folder / "other", folder / "codes", folder / "out", "exact", dry_run=True).notes
    assert "trained over a base quantised by" in note
    options = {"base_quantization": "nf4", "dry_run": True}
    assert export(folder / "other", folder / "codes", folder / "out", "exact", **options).notes == []


@pytest.mark.parametrize("route", ["exact", "merged"])
def test_what_is_there_is_said_before_anything_is_measured(folders, route):
    (folders / "out").mkdir()
    (folders / "out" / "mine").write_text("mine")
    measured = []
    with pytest.raises(FileExistsError, match="is there already"):
        export(folders / "adapter", folders / "base", folders / "out", route, progress=measured.append)
    assert measured == []


def test_going_on_with_another_quantisation_is_refused(folders):
    """The files and the config are the same by name and shape, whatever W0 is."""
    pytest.importorskip("bitsandbytes")
    wide_llama().save_pretrained(folders / "wide", max_shard_size="50KB")
    saved(folders / "over", wide_llama())
    keys = []

    def stop(key):
        keys.append(key)
        if len(keys) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(folders / "over", folders / "wide", folders / "out", "merged", progress=stop)
    with pytest.raises(FileExistsError, match="begun with another option base-quantization"):
        export(folders / "over", folders / "wide", folders / "out", "merged", base_quantization="nf4")
    export(folders / "over", folders / "wide", folders / "out", "merged", base_quantization="none")
