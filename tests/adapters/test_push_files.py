"""What a folder is, and which of its files go to the Hub."""

import os
import pickle

import pytest
import torch
from format_fixtures import llama
from push_fixtures import adapter, export, record

from dora_peft.adapters import UnreadableError
from dora_peft.adapters.push_files import content_of, files_of

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter(tmp_path):
    folder = adapter(tmp_path / "adapter")
    found = content_of(folder)
    assert (found.record, found.parts, found.info.format, len(found.info.modules)) == (None, (), "peft", 2)
    files, notes = files_of(folder, deep=False)
    # the card is made anew
    assert set(files) == ADAPTER
    assert notes == []


@pytest.mark.parametrize(
    ("route", "parts", "expected"),
    [
        ("exact", ("base", "adapter"), {"base/model.safetensors", "base/config.json", "adapter/adapter_config.json"}),
        ("lora", (), ADAPTER),
        ("merged", (), {"model.safetensors", "config.json"}),
    ],
)
def test_an_export(route, parts, expected, tmp_path):
    folder = export(tmp_path / "out", route)
    found = content_of(folder)
    assert (found.record, found.parts, found.info) == (record(route), parts, None)
    files, notes = files_of(folder, deep=True)
    assert expected < set(files)
    assert {name for name in files if name.endswith("dora_export.json")} == (
        {f"{part}/dora_export.json" for part in parts} or {"dora_export.json"}
    )
    assert "manifest.json" not in files
    assert notes == []


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_half_of_an_export(part, tmp_path):
    assert content_of(export(tmp_path / "out", "exact") / part).record == record("exact")


def test_what_stays_here(tmp_path):
    folder = adapter(tmp_path / "adapter")
    torch.save({}, folder / "optimizer.pt")
    torch.save({}, folder / "called_otherwise.dat")
    (folder / "old.dat").write_bytes(pickle.dumps({"a": 1}))
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / ".git").mkdir()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "adapter_config.json").write_text("{}")
    (folder / "data.bin.txt").write_text("text")
    files, notes = files_of(folder, deep=False)
    assert set(files) == {*ADAPTER, "data.bin.txt"}
    assert notes == [
        "not uploaded (folders): .git, checkpoint-5",
        "not uploaded (hidden files): .env",
        "not uploaded (made by pickle, which can hold programs): called_otherwise.dat, old.dat, optimizer.pt",
    ]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_that_lead_out_are_refused(what, tmp_path):
    folder = adapter(tmp_path / "adapter")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.json").write_text("{}")
    os.symlink(tmp_path / "secret" / ("key.json" if what == "file" else ""), folder / "link")
    with pytest.raises(UnreadableError, match="is a link that leads out of its folder"):
        files_of(folder, deep=True)


def test_links_within_the_folder_are_followed(tmp_path):
    folder = adapter(tmp_path / "adapter")
    os.symlink("adapter_config.json", folder / "same.json")
    assert files_of(folder, deep=False)[0]["same.json"].read_text() == (folder / "adapter_config.json").read_text()
    os.symlink("nothing", folder / "broken.json")
    with pytest.raises(UnreadableError, match="a link to nothing"):
        files_of(folder, deep=False)


def test_a_pipe_is_refused(tmp_path):
    folder = adapter(tmp_path / "adapter")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnreadableError, match="no file"):
        files_of(folder, deep=False)


def only_a_pickle(folder):
    adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def damaged(folder):
    path = adapter(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damaged_export(folder):
    path = export(folder, "exact") / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def a_shard_is_missing(folder):
    llama().save_pretrained(folder, max_shard_size="10KB")
    record("merged").write(folder)
    next(folder.glob("model-*.safetensors")).unlink()


def of_two_exports(folder):
    record("exact", command="another").write(export(folder, "exact") / "adapter")


def a_record_alone(folder):
    folder.mkdir()
    record("merged").write(folder)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "There is no folder"),
        (lambda folder: folder.write_text(""), "is a file: expected the folder"),
        (lambda folder: folder.mkdir(), "holds no adapter"),
        (lambda folder: llama().save_pretrained(folder), "its keys are no known adapter's"),
        (only_a_pickle, "pickles are not uploaded.*dora-peft convert"),
        (damaged, "expected a whole safetensors file"),
        (damaged_export, "expected a whole safetensors file"),
        (a_shard_is_missing, "is not whole"),
        (of_two_exports, "base and adapter are of different exports"),
        (a_record_alone, "neither adapter_config.json nor config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_neither_is_refused_in_one_line(make, said, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(UnreadableError, match=said) as caught:
        content_of(tmp_path / "folder")
    assert "\n" not in str(caught.value)
