"""One function for three routes: what it writes and says, over bases of floats and quantised ones."""

import json

import gguf_fixtures
import pytest
import torch
from export_fixtures import outputs
from format_fixtures import logits, saved
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dora_peft.adapters.export import ROUTES, Record, export
from dora_peft.adapters.export.record import read_record
from dora_peft.adapters.formats import UnreadableError

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT = {"load_in_8bit": True}


@pytest.mark.parametrize("route", ROUTES)
def test_each_route(folders, route):
    """At the rank that holds all of W', the approximation is exact as well."""
    more = {"rank": 64} if route == "lora" else {}
    record = export(
        folders / "adapter", folders / "base", folders / "out", route, dtype=torch.float32, command="as typed", **more
    )
    expected = logits(folders / "adapter")
    found = outputs(folders / "out", route, folders / "base")
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert len(record.modules) == 14
    assert record.totals["error_over_update"] < 1e-3
    assert record.warnings() == []
    places = [folders / "out" / name for name in ("base", "adapter")] if route == "exact" else [folders / "out"]
    for place in places:
        stored = json.loads((place / "dora_export.json").read_text())
        assert (stored["route"], stored["dtype"], stored["command"]) == (route, "float32", "as typed")
        assert stored["totals"] == record.totals
    assert ("exact up to rounding of W" in record.statement) == (route != "lora")
    assert ("approximate" in record.statement) == (route == "lora")


@pytest.mark.parametrize("route", ROUTES)
def test_a_dry_run_says_the_same_and_writes_nothing(folders, route):
    more = {"rank": 8} if route == "lora" else {}
    said = export(folders / "adapter", folders / "base", folders / "out", route, dry_run=True, **more)
    assert sorted(path.name for path in folders.iterdir()) == ["adapter", "base"]
    done = export(folders / "adapter", folders / "base", folders / "out", route, **more)
    assert said == done
    assert said.dtype == ("float32" if route == "merged" else "float16")


@pytest.mark.parametrize("to", ["peft", "gguf"])
def test_a_lora_over_a_gguf(tmp_path, to):
    """At the rank that holds all of W' it is the DoRA model over what the file's codes stand for."""
    base = gguf_fixtures.save_gguf(gguf_fixtures.llama(), tmp_path / "model.gguf")
    adapter = gguf_fixtures.trained(base, tmp_path / "adapter")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    done = export(adapter, base, out, "lora", rank=64, dtype=torch.float32, to=to)
    assert done.totals["error_over_update"] < 1e-5
    if to == "gguf":
        assert out.read_bytes()[:4] == b"GGUF"
        return
    found = PeftModel.from_pretrained(gguf_fixtures.loaded(base), out)
    expected = logits(adapter, gguf_fixtures.loaded(base))
    with torch.no_grad():
        assert (found(torch.arange(10)[None]).logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("route", "options", "said"),
    [
        ("merged", {}, r"--as merged of '.*model\.gguf' would have to quantise W' again.* in safetensors"),
        ("exact", {"dequantize": True}, r"--dequantize writes safetensors, and '.*' is a \.gguf"),
    ],
)
def test_what_a_gguf_is_no_base_for(tmp_path, route, options, said):
    base = gguf_fixtures.save_gguf(gguf_fixtures.llama(), tmp_path / "model.gguf")
    with pytest.raises(UnreadableError, match=said):
        export(tmp_path / "adapter", base, tmp_path / "out", route, **options)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_others_does_not_say_how_its_base_was_quantised(folders):
    path = folders / "adapter" / "adapter_config.json"
    assert export(folders / "adapter", folders / "base", folders / "out", "exact", dry_run=True).notes == []
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    (note,) = export(folders / "adapter", folders / "base", folders / "out", "exact", dry_run=True).notes
    assert "does not say how its base was quantised" in note
    assert "% off the norms" in note
    options = {"base_quantization": "none", "dry_run": True}
    assert export(folders / "adapter", folders / "base", folders / "out", "exact", **options).notes == []


@pytest.mark.parametrize(
    ("route", "options", "said"),
    [
        ("quick", {}, "--as quick: expected one of exact, lora, merged"),
        ("exact", {"rank": 8}, "belong to --as lora, and this is exact"),
        ("merged", {"to": "gguf"}, "belong to --as lora, and this is merged"),
        ("lora", {}, "--as lora takes --rank or --error"),
        ("lora", {"rank": 9}, "choose 16"),
        ("lora", {"rank": 8, "covariance": True}, "--covariance .* --calibration"),
        ("merged", {"dequantize": True}, "--dequantize belongs to --as exact"),
        ("exact", {"base_quantization": "q8"}, "--base-quantization: expected one of"),
    ],
)
def test_options_that_do_not_fit(folders, route, options, said):
    with pytest.raises(UnreadableError, match=said):
        export(folders / "adapter", folders / "base", folders / "out", route, **options)
    assert sorted(path.name for path in folders.iterdir()) == ["adapter", "base"]


def test_no_adapter_and_trained_parameters(folders, tmp_path):
    with pytest.raises(UnreadableError, match="expected at least one"):
        export([], folders / "base", folders / "out", "exact")
    saved(tmp_path / "more", modules_to_save=["lm_head"])
    # a copy that equals the base's is nothing that a plain LoRA leaves out
    export(tmp_path / "more", folders / "base", tmp_path / "out", "lora", rank=8)
    tensors = load_file(tmp_path / "more" / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, tmp_path / "more" / "adapter_model.safetensors")
    with pytest.raises(UnreadableError, match=r"also trained 'lm_head.weight'"):
        export(tmp_path / "more", folders / "base", folders / "out", "lora", rank=8)


def test_force_replaces_an_export_alone(folders, tmp_path):
    """Neither an adapter that was trained, the exported one among them, nor a file."""
    trained, out, file = saved(tmp_path / "trained"), tmp_path / "out", tmp_path / "file"
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    file.write_text("my notes")
    for taken in (trained, file):
        with pytest.raises(FileExistsError, match="not what --as lora wrote"):
            export(trained, folders / "base", taken, "lora", rank=8, force=True)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert file.read_text() == "my notes"
    for _ in range(2):
        record = export(trained, folders / "base", out, "lora", rank=8, force=True)
    assert read_record(out) == record


def test_folders_are_named_absolutely(folders, tmp_path, monkeypatch):
    """models/llama could be a name on the Hub, and would be read as one from elsewhere."""
    saved(tmp_path / "runs" / "adapter")
    (tmp_path / "models").symlink_to(folders)
    monkeypatch.chdir(tmp_path)
    for route, config in (("lora", "lora"), ("exact", "exact/adapter")):
        options = {"rank": 8} if route == "lora" else {}
        record = export("runs/adapter", "models/base", route, route, **options)
        assert (record.base, record.adapters) == (str(tmp_path / "models/base"), [str(tmp_path / "runs/adapter")])
        named = json.loads((tmp_path / config / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(tmp_path / ("models/base" if route == "lora" else "exact/base"))


def test_a_record_is_what_json_gives(folders):
    done = export(folders / "adapter", folders / "base", folders / "out", "merged")
    assert Record(**json.loads((folders / "out" / "dora_export.json").read_text())) == done
