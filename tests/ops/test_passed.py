"""What the kernels' check has passed with, on disk: found again if everything is the same, and never an obstacle."""

import json
import os
import platform

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops import passed as subject

GPU = torch.device("cuda", 0)


@pytest.fixture
def record(gpu):
    return subject.record(GPU, torch.float32, "ieee")


def only_file(folder):
    (path,) = folder.rglob("*.json")
    return path


def test_it_names_all_that_the_outcome_depends_on(gpu, record):
    assert (record["gpu"], record["capability"]) == (gpu.name, "9.0")
    assert record["torch"] == torch.__version__
    assert record["triton"] == subject.version("triton")
    assert set(record) >= {"driver", "cuda", "dora_peft", "kernels", "dtype", "precision"}
    assert record != subject.record(GPU, torch.bfloat16, "ieee")
    assert record != subject.record(GPU, torch.float32, "tf32")


def test_an_edited_kernel_is_another(monkeypatch, tmp_path, record):
    from dora_peft.ops.kernels import linear

    path, read_bytes = type(tmp_path), type(tmp_path).read_bytes
    edited = lambda self: read_bytes(self) + (b"#" if str(self) == linear.__file__ else b"")  # noqa: E731
    monkeypatch.setattr(path, "read_bytes", edited)
    subject._digest.cache_clear()
    try:
        assert subject.record(GPU, torch.float32, "ieee")["kernels"] != record["kernels"]
    finally:
        subject._digest.cache_clear()


def test_it_holds_for_what_was_remembered_alone(record, tmp_path):
    assert not subject.holds(record)
    subject.remember(record)
    assert subject.holds(record)
    assert json.loads(only_file(tmp_path).read_text()) == record
    for name in record:
        assert not subject.holds(record | {name: "another"}), name


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'"passed"'])
def test_a_broken_file_is_as_none(record, tmp_path, content):
    subject.remember(record)
    only_file(tmp_path).write_bytes(content)
    assert not subject.holds(record)
    subject.remember(record)
    assert subject.holds(record)


def test_a_folder_in_the_files_place_is_as_none(record, tmp_path):
    subject.remember(record)
    path = only_file(tmp_path)
    path.unlink()
    path.mkdir()
    assert not subject.holds(record)
    subject.remember(record)


def test_nothing_is_remembered_where_nothing_can_be_written(record, tmp_path, monkeypatch):
    """Below a file nobody can write, root included."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    subject.remember(record)
    assert not subject.holds(record)
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_is_remembered_without_a_home(record, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    subject.remember(record)
    assert not subject.holds(record)
    assert os.listdir(tmp_path) == []


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert subject._folder() == tmp_path / ".cache" / "dora_peft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert subject._folder() == tmp_path / "cache" / "dora_peft"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert subject._folder() == tmp_path / "triton" / "dora_peft"
