"""Damaged adapters and full disks: each error names the file, and models and folders stay as they were."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft.peft_model
import pytest
import torch
from bad_input_fixtures import adapted, check_untouched, config, files, llama, output
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
ROOT = Path(__file__).parents[2]
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def edit(folder, change):
    """Save the adapter's tensors again after `change` has worked on them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def nan(tensors):
    tensors[f"{MODULE}.lora_B.weight"][0, 0] = float("nan")


def infinite(tensors):
    tensors[f"{MODULE}.lora_magnitude_vector.weight"][3] = float("inf")


def integers(tensors):
    tensors[f"{MODULE}.lora_A.weight"] = tensors[f"{MODULE}.lora_A.weight"].to(torch.int32)


def one_magnitude_missing(tensors):
    del tensors[f"{MODULE}.lora_magnitude_vector.weight"]


def plain_lora(tensors):
    for key in [k for k in tensors if "magnitude" in k]:
        del tensors[key]


def other_rank(tensors):
    tensors[f"{MODULE}.lora_A.weight"] = torch.zeros(3, 16)


def other_width(tensors):
    tensors[f"{MODULE}.lora_magnitude_vector.weight"] = torch.ones(24)


DAMAGES = [
    (nan, r"layers\.0\.self_attn\.q_proj\.lora_B.* NaN or infinite.*Nothing was loaded.*intact"),
    (infinite, r"layers\.0\.self_attn\.q_proj\.lora_magnitude_vector.* NaN or infinite.*Nothing was loaded.*intact"),
    (integers, r"layers\.0\.self_attn\.q_proj\.lora_A.*torch\.int32 instead of a floating point.*intact"),
    (one_magnitude_missing, r"layers\.0\.self_attn\.q_proj have factors but no magnitude.*intact"),
    (plain_lora, r"q_proj.*v_proj have factors but no magnitude \(a plain LoRA adapter\?\).*peft\.LoraConfig"),
    (other_rank, r"(?s)(shapes.*)?q_proj\.lora_A.*(\[3, 16\]|another name)"),
    (other_width, r"(?s)(shapes.*)?q_proj\.lora_magnitude_vector.*(\[24\]|another name)"),
]
damaged_files = pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])


@damaged_files
def test_from_pretrained_of_a_damaged_adapter(damage, message, saved):
    edit(saved, damage)
    base = llama()
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    check_untouched(base)


@damaged_files
def test_load_adapter_of_a_damaged_adapter(damage, message, saved):
    model = adapted(seed=2)
    before, keys = output(model), model.state_dict().keys()
    edit(saved, damage)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "second")
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == keys
    assert torch.equal(output(model), before)
    # the name is free again
    adapted().save_pretrained(saved)
    model.load_adapter(saved, "second")


@damaged_files
def test_load_adapter_over_an_existing_name(damage, message, saved):
    """A failed reload must not leave the adapter of that name half old and half new."""
    model = adapted(seed=2)
    before = output(model)
    edit(saved, damage)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "default")
    assert torch.equal(output(model), before)


@damaged_files
def test_hotswap_of_a_damaged_adapter(damage, message, saved):
    model = adapted(seed=2)
    before = output(model)
    edit(saved, damage)
    with pytest.raises(ValueError, match=message):
        model.hotswap_adapter(str(saved))
    assert torch.equal(output(model), before)


@damaged_files
def test_transformers_load_adapter_of_a_damaged_adapter(damage, message, saved):
    edit(saved, damage)
    base = llama()
    with pytest.raises((ValueError, RuntimeError)):
        base.load_adapter(str(saved))
    check_untouched(base)


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "hotswap"])
def test_a_truncated_file(way, keep, saved):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    base, model = llama(), adapted(seed=2)
    before = output(model)
    load = {
        "from_pretrained": lambda: PeftModel.from_pretrained(base, saved),
        "load_adapter": lambda: model.load_adapter(saved, "second"),
        "hotswap": lambda: model.hotswap_adapter(str(saved)),
    }[way]
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*truncated.*save or download") as caught:
        load()
    assert str(saved) in str(caught.value)
    assert isinstance(caught.value, SafetensorError)
    check_untouched(base)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), before)


def test_a_folder_without_weights(saved):
    (saved / WEIGHTS).unlink()
    base = llama()
    with pytest.raises((ValueError, OSError), match=r"adapter_model") as caught:
        PeftModel.from_pretrained(base, saved)
    assert str(saved) in str(caught.value)
    check_untouched(base)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_is_not_an_object(text, saved):
    (saved / "adapter_config.json").write_text(text)
    base = llama()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(base, saved)
    check_untouched(base)


@pytest.mark.parametrize(("name", "value"), [("r", 0), ("lora_dropout", 2.0), ("bias", "some")])
def test_a_wrong_value_in_a_saved_config(name, value, saved):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    base = llama()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        PeftModel.from_pretrained(base, saved)
    check_untouched(base)


def full_disk(monkeypatch):
    """Every safetensors file runs out of space half-way."""

    def write_half(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(peft.peft_model, "safe_save_file", write_half)


def test_a_full_disk_leaves_no_new_directory(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    for target in (tmp_path / "adapter", tmp_path / "deep" / "er"):
        with pytest.raises(OSError, match=r"No space left.*Nothing was written.*Free space") as caught:
            adapted().save_pretrained(target)
        assert str(target) in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    before = files(saved)
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        adapted(seed=2, r=4).save_pretrained(saved)
    assert files(saved) == before
    assert sorted(f.name for f in saved.iterdir()) == sorted(before)
    loaded = PeftModel.from_pretrained(llama(), saved).eval()
    assert torch.equal(output(loaded), output(adapted()))


def test_a_full_disk_in_the_second_adapter_leaves_both_old_ones(tmp_path, monkeypatch):
    model = adapted()
    model.add_adapter("second", config(r=3))
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    write = peft.peft_model.safe_save_file
    calls = []

    def second_fails(tensors, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(tensors, path, *args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", second_fails)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert len(calls) == 2
    assert files(tmp_path) == before


def test_a_model_card_that_cannot_be_written(saved, monkeypatch):
    before = files(saved)

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dora_peft.adapters.card.complete_model_card", no_space)
    with pytest.raises(OSError, match="No space left"):
        adapted(seed=2).save_pretrained(saved)
    assert files(saved) == before


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_the_systems_limit_on_file_size(tmp_path):
    """A true half-written file: the system stops the writer, over an old adapter and in a new folder."""
    program = """
import resource, signal, sys, torch
from pathlib import Path
from peft import get_peft_model
from dora_peft import DoraConfig

def model(size):
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(size, size)), DoraConfig(r=2, target_modules=["0"]))

old, new = Path(sys.argv[1]), Path(sys.argv[2])
model(8).save_pretrained(old)
before = {f.name: f.read_bytes() for f in old.iterdir()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for folder in (old, new):
    try:
        model(4096).save_pretrained(folder)
    except OSError as error:
        print(error)
assert {f.name: f.read_bytes() for f in old.iterdir()} == before
assert not new.exists()
print("intact")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-c", program, *folders], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.strip().splitlines()
    assert last == "intact"
    assert len(errors) == 2
    for folder, error in zip(folders, errors, strict=True):
        assert f"Could not save the adapter in '{folder}'" in error
        assert "Free space" in error


def test_saving_over_a_removed_folder_creates_it_again(saved):
    shutil.rmtree(saved)
    adapted().save_pretrained(saved)
    assert (saved / WEIGHTS).exists()
