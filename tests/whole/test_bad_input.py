"""Wrong input: each error names what was found, where, and how to mend it, and nothing half-done stays behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, DoraLayer

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
ROOT = Path(__file__).parents[2]
IDS = torch.arange(12).view(2, 6)
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def llama(hidden_size=16):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()


def config(**options):
    return DoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))


def adapted(seed=1, **options):
    base = llama()
    torch.manual_seed(seed)
    return get_peft_model(base, config(**options)).eval()


@torch.no_grad()
def output(model):
    return model(IDS).logits


@pytest.fixture
def saved(tmp_path):
    """The folder of an intact adapter."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, change):
    """Save the adapter's tensors again after `change` has worked on them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def check_untouched(base):
    """No adapter, no trace of one, the weights and what is trainable as at first."""
    fresh, state = llama().state_dict(), base.state_dict()
    assert not any(isinstance(m, DoraLayer) for m in base.modules())
    assert "peft_config" not in vars(base)
    assert state.keys() == fresh.keys()
    assert all(torch.equal(state[k], v) for k, v in fresh.items())
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == []


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


# ---- configuration and base model


@pytest.mark.parametrize("targets", [["q_prj"], r".*\.q_prj"])
def test_unknown_target_module(targets):
    base = llama()
    with pytest.raises(ValueError, match=r"q_prj.*not found in the base model.*q_proj.*all-linear"):
        get_peft_model(base, config(target_modules=targets))
    check_untouched(base)


@pytest.mark.parametrize("r", [0, -3, 1.5, True, "8"])
def test_a_rank_that_is_not_a_positive_integer(r):
    with pytest.raises(ValueError, match=rf"`r` should be a positive integer.*{r}"):
        config(r=r)
    with pytest.raises(ValueError, match=rf"positive integer.*{r}.*rank_pattern\['q_proj'\]"):
        config(rank_pattern={"q_proj": r})


def test_a_rank_larger_than_the_layer():
    """Up to the longer side, or 16, which a usual rank on a narrow layer may be, it only wastes parameters."""
    base = llama()
    with pytest.raises(ValueError, match=r"r=17 .*layers\.0\.self_attn\.q_proj.*16 x 16.*r <= 16.*rank_pattern"):
        get_peft_model(base, config(r=17))
    check_untouched(base)
    for width, allowed in ((2, 16), (20, 20)):
        get_peft_model(nn.Sequential(nn.Linear(width, 2)), DoraConfig(r=allowed, target_modules=["0"]))
        narrow = nn.Sequential(nn.Linear(width, 2))
        with pytest.raises(ValueError, match=rf"r={allowed + 1} .*module '0'.*2 x {width}.*r <= 2"):
            get_peft_model(narrow, DoraConfig(r=allowed + 1, target_modules=["0"]))


def test_a_base_weight_of_integers():
    base = llama()
    layer = base.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj.*Linear.*float32.*torch\.int8.*exclude_modules"
    ):
        get_peft_model(base, config())
    assert not any(isinstance(m, DoraLayer) for m in base.modules())


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)])
def test_a_module_that_cannot_be_adapted(module):
    base = nn.ModuleDict({"odd": module, "even": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"odd.*exclude_modules"):
        get_peft_model(base, DoraConfig(r=2, target_modules=r"even|odd(\.out_proj)?"))
    assert type(base["even"]) is nn.Linear
    assert base["odd"] is module


def test_after_a_refusal_the_same_model_can_be_adapted():
    base = llama()
    with pytest.raises(ValueError, match="r=17"):
        get_peft_model(base, config(r=17))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about adapters that are there already
        model = get_peft_model(base, config())
    assert list(model.peft_config) == ["default"]
    assert model.base_model.model is base


def test_a_refused_second_adapter_leaves_the_first():
    model = adapted()
    before = output(model)
    keys = model.state_dict().keys()
    for wrong in (config(r=17), config(target_modules=["q_prj"])):
        with pytest.raises(ValueError, match=r"r=17|q_prj"):
            model.add_adapter("second", wrong)
        assert list(model.peft_config) == ["default"]
        assert model.state_dict().keys() == keys
        assert torch.equal(output(model), before)
    model.add_adapter("second", config())


def test_adapters_of_different_kinds():
    message = r"different peft types.*{}.*{}.*'second'.*merge_and_unload"
    model = adapted()
    with pytest.raises(ValueError, match=message.format("DORA", "LORA")):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=message.format("DORA", "IA3")):
        model.add_adapter("second", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=message.format("LORA", "DORA")):
        plain.add_adapter("second", config())
    assert list(plain.peft_config) == ["default"]


# ---- damaged adapters, through every way in


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


def test_a_plain_lora_folder_given_as_dora(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Expected a DoRA adapter, found plain LoRA.*peft\.LoraConfig") as caught:
        DoraConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    base = llama()
    with pytest.raises(ValueError, match=r"no magnitude \(a plain LoRA adapter\?\).*peft\.LoraConfig"):
        PeftModel.from_pretrained(base, tmp_path, config=DoraConfig(target_modules=["q_proj"]))
    check_untouched(base)
    model = adapted()
    with pytest.raises(ValueError, match=r"different peft types.*'second'.*merge_and_unload"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


def test_an_adapter_of_another_base_model(saved):
    base = llama(hidden_size=24)
    with pytest.raises(ValueError, match=r"(?s)q_proj.*another base model.*own base model") as caught:
        PeftModel.from_pretrained(base, saved)
    assert str(saved) in str(caught.value)
    assert not any(isinstance(m, DoraLayer) for m in base.modules())


# ---- folders


def test_a_folder_without_config(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    message = r"adapter_config\.json.*notes\.txt.*save_pretrained"
    base, model = llama(), adapted()
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: model.load_adapter(tmp_path, "second"),
        lambda: PeftConfig.from_pretrained(str(tmp_path)),
        lambda: DoraConfig.from_pretrained(str(tmp_path)),
        lambda: model.hotswap_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load()
        assert str(tmp_path) in str(caught.value)
    check_untouched(base)
    assert list(model.peft_config) == ["default"]


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


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    for save in (adapted().save_pretrained, config().save_pretrained):
        with pytest.raises(ValueError, match=r"file") as caught:
            save(str(tmp_path / "adapter"))
        assert str(tmp_path / "adapter") in str(caught.value)
    assert files(tmp_path) == {"adapter": b"mine"}


def test_a_folder_that_may_not_be_created(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"Could not save the adapter in.*another directory") as caught:
        adapted().save_pretrained(tmp_path / "file" / "adapter")
    assert str(tmp_path / "file" / "adapter") in str(caught.value)
    assert files(tmp_path) == {"file": b"mine"}


# ---- a full disk


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
