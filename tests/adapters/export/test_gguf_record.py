"""What is said of a .gguf by what the adapters' folders say of the base of their training."""

import json

import pytest
import torch
from format_fixtures import saved
from gguf_fixtures import llama, save_gguf, trained

from dora_peft.adapters.export import export
from dora_peft.adapters.formats import UnreadableError

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def folders(tmp_path):
    path = save_gguf(llama(), tmp_path / "model.gguf", "Q4_0")
    trained(path, tmp_path / "adapter")
    return tmp_path


def recorded(folder, record):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    mapping = config["auto_mapping"]
    (own,) = (value for value in mapping.values() if isinstance(value, dict))
    own["base_quantization"] = record
    path.write_text(json.dumps(config))


def notes(folders, base="model.gguf", **options):
    done = export(folders / "adapter", folders / base, folders / "out", "exact", dry_run=True, **options)
    return [note for note in done.notes if "belongs to" not in note]


def test_the_file_of_training_is_right(folders):
    config = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    (own,) = (value for value in config["auto_mapping"].values() if isinstance(value, dict))
    assert own["base_quantization"]["quant_method"] == "gguf"
    assert notes(folders) == []


def test_another_file_is_said(folders):
    save_gguf(llama(), folders / "other.gguf", "Q8_0")
    (note,) = notes(folders, "other.gguf")
    assert "trained over 'model.gguf', and 'other.gguf' holds Q8_0: magnitudes are" in note


def test_a_base_that_was_not_quantised_is_said(folders):
    saved(folders / "adapter", llama())
    (note,) = notes(folders)
    assert "over a base that was not quantised, and 'model.gguf' holds Q4_0: magnitudes are" in note
    assert "% off the norms" in note
    assert notes(folders, base_quantization="none") == []
    save_gguf(llama(), folders / "floats.gguf", "F16")
    assert notes(folders, "floats.gguf") == []


def test_a_folder_that_does_not_say(folders):
    path = folders / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    (note,) = notes(folders)
    assert "does not say how its base was quantised" in note


@pytest.mark.parametrize("route", ["exact", "lora"])
def test_another_method_is_refused(folders, route):
    more = {"rank": 8} if route == "lora" else {}
    named = {"base_quantization": "nf4", **more}
    with pytest.raises(UnreadableError, match=r"quantised by bitsandbytes, and .* is quantised otherwise"):
        export(folders / "adapter", folders / "model.gguf", folders / "out", route, **named)
    recorded(folders / "adapter", NF4)
    with pytest.raises(UnreadableError, match=r"quantised by bitsandbytes, and .* is quantised otherwise"):
        export(folders / "adapter", folders / "model.gguf", folders / "out", route, **more)
    assert not (folders / "out").exists()
    named["base_quantization"] = "none"
    export(folders / "adapter", folders / "model.gguf", folders / "out", route, **named)


def test_over_safetensors_the_file_is_asked_for(folders):
    llama().save_pretrained(folders / "base")
    with pytest.raises(
        UnreadableError, match=r"over a \.gguf \(model\.gguf\), .* not quantised: name that file, or"
    ) as e:
        export(folders / "adapter", folders / "base", folders / "out", "merged")
    assert "--base-quantization none" in str(e.value)
    options = {"base_quantization": "none", "dtype": torch.float32, "dry_run": True}
    assert export(folders / "adapter", folders / "base", folders / "out", "merged", **options).notes == []
