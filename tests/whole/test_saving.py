"""Full and read-only file systems, real ones: one line, old files as they were, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_input_fixtures import adapted, check_untouched, config, files, llama, output
from peft import PeftModel, get_peft_model

from dora_peft import DoraConfig

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
ROOT = Path(__file__).parents[2]

# Runs with a file system of its own at sys.argv[1], which vanishes with it.
PROGRAM = """
import gc, json, os, subprocess, sys, torch
from pathlib import Path
from peft import get_peft_model
from dora_peft import DoraConfig
from dora_peft.adapters import convert

folder = Path(sys.argv[1])

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

def adapted(size):
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(size, size)), DoraConfig(r=2, target_modules=["0"]))

def tree():
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}

small, large, found = adapted(8), adapted(4096), {}
elsewhere = folder.parent / "elsewhere"
small.save_pretrained(elsewhere)

def attempt(what, save):
    before, held = tree(), {n: t.clone() for n, t in large.state_dict().items()}
    try:
        save()
        said = "saved"
    except OSError as error:
        said = str(error)
    same = all(torch.equal(t, held[n]) for n, t in large.state_dict().items())
    found[what] = {"said": said, "nothing changed": tree() == before, "the model is as before": same}

mount("size=96k")
small.save_pretrained(folder / "old")
for kind, safe in (("safetensors", True), ("bin", False)):
    attempt(f"{kind}, a new folder", lambda: large.save_pretrained(folder / "new" / "er", safe_serialization=safe))
    attempt(f"{kind}, an old folder", lambda: large.save_pretrained(folder / "old", safe_serialization=safe))
(folder / "rest").touch()
try:
    (folder / "rest").write_bytes(bytes(200_000))
except OSError:
    # the system has written what fits
    pass
attempt("no byte left", lambda: small.save_pretrained(folder / "new"))
attempt("no byte left, a config", lambda: DoraConfig().save_pretrained(folder / "new"))
attempt("no byte left, an old config", lambda: DoraConfig(r=3).save_pretrained(folder / "old"))
attempt("no byte left, converted", lambda: convert(elsewhere, folder / "new", "nvlabs"))
attempt("no byte left, converted in place", lambda: convert(elsewhere, folder / "old", "nvlabs", force=True))
(folder / "rest").unlink()
# a cycle of the last error may hold its file open, and the system busy
gc.collect()
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
attempt("read-only, a new folder", lambda: small.save_pretrained(folder / "new"))
attempt("read-only, an old folder", lambda: small.save_pretrained(folder / "old"))
attempt("read-only, a config", lambda: DoraConfig().save_pretrained(folder / "new"))
attempt("read-only, converted", lambda: convert(elsewhere, folder / "new", "nvlabs"))
attempt("read-only, converted in place", lambda: convert(elsewhere, folder / "old", "nvlabs", force=True))
subprocess.run(["umount", folder], check=True)
mount("size=1m,nr_inodes=3")
attempt("no inode left", lambda: small.save_pretrained(folder / "new" / "er"))
subprocess.run(["umount", folder], check=True)
mount("size=1m")
attempt("enough", lambda: small.save_pretrained(folder / "new"))
print(json.dumps(found))
"""


def test_full_and_read_only_file_systems(tmp_path):
    """chmod does not refuse root, so that the file systems are mounted, in a namespace that ends with the program."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs unshare of Linux")
    own = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    folder = tmp_path / "system"
    folder.mkdir()
    allowed = subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"mounting is not permitted here: {allowed.stderr.strip()}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*own, sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("enough")["said"] == "saved"
    assert len(found) == 15
    for what, result in found.items():
        assert result["said"].startswith("Could not save the adapter"), what
        assert result["said"].endswith("Free space, or choose another directory."), what
        assert result["said"].count("Could not save") == 1, what
        assert "\n" not in result["said"], what
        assert str(folder) in result["said"], what
        said = "Read-only file system" if "read-only" in what else "No space left" if "bin" not in what else "pos"
        assert said in result["said"], what
        assert result["nothing changed"], what
        assert result["the model is as before"], what
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="chmod does not refuse root")
def test_a_folder_without_permission(tmp_path):
    before = files(tmp_path)
    tmp_path.chmod(0o500)
    try:
        for save in (adapted().save_pretrained, config().save_pretrained):
            with pytest.raises(OSError, match=r"Could not save the adapter.*Permission denied"):
                save(tmp_path / "adapter")
    finally:
        tmp_path.chmod(0o700)
    assert files(tmp_path) == before


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "README.md", "adapter_model"])
def test_a_directory_in_the_place_of_a_file(tmp_path, name, safe):
    """Found before the first file is replaced; an adapter whose config is of another one loads in silence."""
    name += {"adapter_model": ".safetensors" if safe else ".bin"}.get(name, "")
    adapted().save_pretrained(tmp_path, safe_serialization=safe)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    before, model = files(tmp_path), adapted(seed=2, r=4)
    expected = output(model)
    with pytest.raises(OSError, match=r"Could not save the adapter.*[Dd]irectory"):
        model.save_pretrained(tmp_path, safe_serialization=safe)
    assert files(tmp_path) == before
    assert not [f.name for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert torch.equal(output(model), expected)


def bad_bin(kind, tensors, path):
    if kind == "an object":
        torch.save({**tensors, "own": Path("x")}, path)
    elif kind == "a list":
        torch.save(list(tensors.values()), path)
    elif kind == "a text among the tensors":
        torch.save({**tensors, "note": "mine"}, path)
    elif kind == "of older torch, cut short":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "a page of the web":
        path.write_text("<html>not found</html>")
    else:
        torch.save(tensors, path)
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "zeros": bytes(500)}.get(kind, content[: len(content) // 2]))


@pytest.fixture
def pickled(tmp_path):
    """The folder of an adapter whose tensors are in adapter_model.bin."""
    adapted().save_pretrained(tmp_path / "adapter", safe_serialization=False)
    return tmp_path / "adapter"


def test_an_intact_pickle_loads(pickled):
    assert torch.equal(output(PeftModel.from_pretrained(llama(), pickled).eval()), output(adapted()))


@pytest.mark.parametrize(
    "kind",
    [
        "an object",
        "a list",
        "a text among the tensors",
        "of older torch, cut short",
        "a page of the web",
        "empty",
        "zeros",
        "cut short",
    ],
)
def test_a_pickle_that_cannot_be_read(pickled, kind):
    path = pickled / "adapter_model.bin"
    bad_bin(kind, torch.load(path), path)
    base, model = llama(), adapted(seed=2)
    before = output(model)
    for load in (
        lambda: PeftModel.from_pretrained(base, pickled),
        lambda: model.load_adapter(pickled, "second"),
        lambda: model.load_adapter(pickled, "default"),
        lambda: model.hotswap_adapter(str(pickled)),
    ):
        with pytest.raises(ValueError, match=r"Cannot read the adapter's tensors from .*safetensors") as caught:
            load()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        # torch's advice, which would run the file
        assert "weights_only" not in str(caught.value)
    check_untouched(base)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("damage", ["cut short", "no weights", "no config"])
def test_transformers_load_adapter_of_a_folder_that_is_not_whole(saved, damage):
    weights = saved / "adapter_model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        (weights if damage == "no weights" else saved / "adapter_config.json").unlink()
    base = llama()
    with pytest.raises((ValueError, OSError), match=r"adapter.model|adapter_config\.json") as caught:
        base.load_adapter(str(saved))
    assert str(saved) in str(caught.value)
    check_untouched(base)


def test_after_a_failed_saving_the_next_succeeds(tmp_path, monkeypatch):
    model = get_peft_model(llama(), DoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="Could not save the adapter"):
        model.save_pretrained(tmp_path / "file" / "adapter")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()), output(model))
