"""Safetensors files that are written tensor after tensor, read by safetensors itself."""

import json
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_peft.adapters.export import shards
from dora_peft.adapters.export.shards import ShardWriter, digest_of, read_head
from dora_peft.adapters.formats import UnreadableError
from dora_peft.adapters.formats.checkpoint import DTYPES

ALL = [dtype for name, dtype in DTYPES.items() if name != "F4"]
FP4 = torch.arange(16, dtype=torch.uint8).reshape(4, 4).view(torch.float4_e2m1fn_x2)


def write(path, tensors, dtype=None, keys_bytes=1000, tensors_at_most=100):
    with ShardWriter(path, keys_bytes, tensors_at_most, {"format": "pt"}) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor, dtype)
        return writer.finish()


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def examples():
    """Of every dtype; in lengths after which the next tensor would not lie at a multiple of its elements' size."""
    tensors = {}
    for length in (3, 8):
        for dtype in ALL:
            tensors[f"{dtype} {length}"] = torch.randint(0, 2, (length,)).to(dtype)
    return tensors | {"empty": torch.empty(0, 4), "rows": torch.randn(5, 7), "two in a byte": FP4}


def test_safetensors_reads_what_was_written(tmp_path):
    tensors = examples()
    nbytes, digest = write(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(equal(found[key], tensor) for key, tensor in tensors.items())
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert nbytes == (tmp_path / "x").stat().st_size
    assert digest == digest_of(tmp_path / "x")


def test_every_tensor_lies_at_a_multiple_of_its_elements_size(tmp_path):
    tensors = examples()
    write(tmp_path / "x", tensors)
    for key, (start, stop) in read_head(tmp_path / "x").items():
        assert start % tensors[key].element_size() == 0, key
        assert stop - start == tensors[key].nbytes, key


def test_a_number_without_dimensions_and_strided_tensors(tmp_path):
    tensors = {"number": torch.tensor(2.5), "turned": torch.randn(4, 6).T, "part": torch.randn(4, 6)[:, ::2]}
    write(tmp_path / "x", tensors)
    assert all(torch.equal(load_file(tmp_path / "x")[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_blocks_are_cast_as_the_whole_is(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(shards, "STEP_BYTES", 64)
    tensors = {"x": torch.randn(13, 7), "infinite": torch.tensor([float("inf"), 1.0, float("nan"), 2.0])}
    write(tmp_path / "x", tensors, dtype)
    assert all(equal(load_file(tmp_path / "x")[key], tensor.to(dtype)) for key, tensor in tensors.items())


def test_a_number_too_large_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UnreadableError, match=r"'x' has numbers too large for float16.*--dtype") as caught:
        write(tmp_path / "x", {"x": torch.full((8,), 1e6)}, torch.float16)
    assert "\n" not in str(caught.value)


def test_no_key_twice_and_no_head_that_does_not_fit(tmp_path):
    with ShardWriter(tmp_path / "x", 100, 4, {}) as writer:
        for key, length in (("late", 1), ("x", 2)):
            writer.add(key, torch.zeros(length))
            with pytest.raises(ValueError, match="written twice"):
                writer.add(key, torch.zeros(length))
    with pytest.raises(ValueError, match="The head"):
        write(tmp_path / "x", {"k" * 1000: torch.zeros(2)}, keys_bytes=10, tensors_at_most=1)


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """torch's own memory is not seen by tracemalloc: what is counted is the blocks that are cast."""
    monkeypatch.setattr(shards, "STEP_BYTES", 2**16)
    seen = []
    cast = shards._cast
    monkeypatch.setattr(shards, "_cast", lambda key, part, dtype: seen.append(part.nbytes) or cast(key, part, dtype))
    tracemalloc.start()
    write(tmp_path / "x", {"x": torch.zeros(2**20), "y": torch.zeros(2**20)}, torch.bfloat16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) > 100
    assert max(seen) <= 2**16
    assert peak < 2**20


def test_the_digest_changes_with_any_byte(tmp_path):
    write(tmp_path / "x", {"x": torch.arange(8.0)})
    content, digest = (tmp_path / "x").read_bytes(), digest_of(tmp_path / "x")
    for at in (0, 9, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / "y").write_bytes(changed)
        assert digest_of(tmp_path / "y") != digest, at


def test_the_head_of_a_file_by_safetensors(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.ones(2, 2)}, tmp_path / "x", metadata={"format": "pt"})
    content = (tmp_path / "x").read_bytes()
    for key, (start, stop) in read_head(tmp_path / "x").items():
        expected = {"a": torch.zeros(3), "b": torch.ones(4)}[key].numpy().tobytes()
        assert content[start:stop] == expected, key
    (tmp_path / "y").write_bytes((2**40).to_bytes(8, "little") + json.dumps({}).encode())
    with pytest.raises(ValueError, match="no safetensors file"):
        read_head(tmp_path / "y")
