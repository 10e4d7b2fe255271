"""What an unfinished export is recognised by."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_peft.adapters.export.manifest import (
    NAME,
    Finished,
    Manifest,
    describe,
    digest_files,
    read_manifest,
    write_synced,
)
from dora_peft.adapters.export.shards import digest_of
from dora_peft.adapters.formats import UnreadableError


@pytest.fixture
def base(tmp_path):
    tensors = {"norm": torch.randn(3), "large": torch.randn(300, 300), "last": torch.randn(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def described(base, config=None, options=None, plan="plan"):
    return describe([base], config or {"a": 1}, options or {"route": "merged"}, plan)


def keeping_time(base, change):
    """Change a file and give it the old time."""
    found = base.stat()
    change()
    os.utime(base, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_the_same_inputs_are_the_same(base):
    assert described(base).difference(described(base)) is None


def test_each_input_tells(base):
    one = described(base)
    assert "config" in one.difference(described(base, config={"a": 2}))
    assert "option route" in one.difference(described(base, options={"route": "exact"}))
    assert "option new" in one.difference(described(base, options={"route": "merged", "new": "1"}))
    assert "plan" in one.difference(described(base, plan="another"))
    other = Manifest({**one.inputs, "version of torch": "1.0"})
    assert one.difference(other) == "version of torch"


@pytest.mark.parametrize("key", ["norm", "large", "last"])
def test_another_tensor_tells_even_in_a_file_of_the_same_size_and_time(base, key):
    one, tensors = described(base), load_file(base)
    tensors[key] = tensors[key] + 1
    keeping_time(base, lambda: save_file(tensors, base, metadata={"format": "pt"}))
    assert one.difference(described(base)) == "base's model.safetensors"


def test_a_number_changed_in_place_between_the_samples_tells_by_the_files_time(base):
    one, content = described(base), bytearray(base.read_bytes())
    content[len(content) // 3] ^= 1
    keeping_time(base, lambda: base.write_bytes(content))
    assert one.difference(described(base)) is None
    os.utime(base, ns=(0, base.stat().st_mtime_ns + 1))
    assert one.difference(described(base)) == "base's model.safetensors"


def test_it_comes_back_from_its_file(base, tmp_path):
    one = described(base)
    one.shards["x"] = Finished(base.stat().st_size, digest_of(base))
    one.write(tmp_path)
    found = read_manifest(tmp_path)
    assert found == one
    assert found.shards["x"].is_that_of(base)
    assert not (tmp_path / f"{NAME}.tmp").exists()


def test_a_file_that_is_not_whole_is_none(base, tmp_path):
    finished = Finished(base.stat().st_size, digest_of(base))
    content = bytearray(base.read_bytes())
    assert not finished.is_that_of(tmp_path / "nothing")
    (tmp_path / "short").write_bytes(content[:-1])
    assert not finished.is_that_of(tmp_path / "short")
    content[-1] ^= 1
    (tmp_path / "changed").write_bytes(content)
    assert not finished.is_that_of(tmp_path / "changed")


def test_no_manifest_another_programs_and_a_broken_one(base, tmp_path):
    (tmp_path / "empty").mkdir()
    assert read_manifest(tmp_path / "empty") is None
    (tmp_path / NAME).write_text('{"files": []}')
    assert described(base).difference(read_manifest(tmp_path)) is not None
    for shards in ('{"a": {}}', '{"a": 1}'):
        (tmp_path / NAME).write_text(f'{{"inputs": {{}}, "shards": {shards}}}')
        assert described(base).difference(read_manifest(tmp_path)) is not None
    (tmp_path / NAME).write_text("{")
    with pytest.raises(UnreadableError, match="expected a JSON object"):
        read_manifest(tmp_path)


def test_small_files_are_hashed_whole_and_by_name(tmp_path):
    for name, content in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    digests = {digest_files([tmp_path / name for name in names]) for names in ("a", "b", "c", "ab", "ba")}
    assert len(digests) == 5


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    write_synced(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
