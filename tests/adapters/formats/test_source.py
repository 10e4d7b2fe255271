"""Files that are no adapter, or not whole: one clear line, nothing written, nothing executed."""

import json
import os
import struct

import pytest
import torch
from format_fixtures import saved
from safetensors.torch import save

from dora_peft.adapters import UnreadableError, convert
from dora_peft.adapters.formats import read_source

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("whole") / "adapter", target_modules=["q_proj"])


def in_a_folder(whole, tmp_path, content):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def with_head(head, data=b""):
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
BROKEN = {
    "empty": b"",
    "a text": b"this is no adapter",
    "a head longer than the file": struct.pack("<Q", 10_000) + b"{}",
    "a head above 100 MB": struct.pack("<Q", 200_000_000) + b"{" + b" " * 1000,
    "a head that is no JSON": struct.pack("<Q", 4) + b"\xff\xfe\x00{",
    "overlapping offsets": with_head({"a.lora_A.weight": ONE, "b": {**ONE, "data_offsets": [8, 24]}}, bytes(24)),
    "a hole between offsets": with_head({"a.lora_A.weight": ONE, "b": {**ONE, "data_offsets": [24, 40]}}, bytes(40)),
    "a shape that does not fit its bytes": with_head({"a.lora_A.weight": {**ONE, "shape": [2, 3]}}, bytes(16)),
    "a huge shape": with_head({"a.lora_A.weight": {**ONE, "shape": [2**40, 2**40]}}, bytes(16)),
    "offsets beyond the end": with_head({"a": {**ONE, "shape": [2**30], "data_offsets": [0, 2**32]}}, bytes(16)),
    "a dtype that there is not": with_head({"a.lora_A.weight": {**ONE, "dtype": "F33"}}, bytes(16)),
    "bytes after the last tensor": with_head({"a.lora_A.weight": ONE}, bytes(20)),
    "no tensors": with_head({}),
    "a separator in a name": with_head({"../a.lora_A.weight": ONE}, bytes(16)),
    "another separator in a name": with_head({"a\\b.lora_A.weight": ONE}, bytes(16)),
    "what cannot be printed": with_head({"a\x1b[2J.lora_A.weight": ONE}, bytes(16)),
}  # fmt: skip


def refused(source, tmp_path, match, **options):
    target = tmp_path / "out"
    with pytest.raises(UnreadableError, match=match) as caught:
        convert(source, target, "nvlabs", **options)
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("what", BROKEN)
def test_damaged_files(whole, tmp_path, what):
    refused(in_a_folder(whole, tmp_path, BROKEN[what]), tmp_path, r"adapter_model\.safetensors")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_files(whole, tmp_path, share):
    content = (whole / "adapter_model.safetensors").read_bytes()
    folder = in_a_folder(whole, tmp_path, content[: int(len(content) * share)])
    refused(folder, tmp_path, "expected a whole safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[1]",
        "{",
        "{}",
        "[" * 100_000,
        '{"r": "4", "lora_alpha": 1}',
        '{"r": 4, "lora_alpha": null}',
        '{"r": 5, "lora_alpha": 1}',
        '{"r": 4, "lora_alpha": 1, "rank_pattern": 3}',
    ],
    ids=range(10),
)
def test_damaged_configs(whole, tmp_path, text):
    folder = in_a_folder(whole, tmp_path, (whole / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_text(text)
    refused(folder, tmp_path, "adapter_config")


def test_no_config(whole, tmp_path):
    folder = in_a_folder(whole, tmp_path, (whole / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").unlink()
    refused(folder, tmp_path, r"has no adapter_config\.json beside it")


def test_pickles_are_read_on_request_alone(whole, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
    tensors = read_source(whole).tensors
    torch.save(tensors, folder / "adapter_model.bin")
    refused(folder, tmp_path, "--allow-pickle")
    found = read_source(folder, allow_pickle=True).tensors
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    for content in ({"a": 1}, [torch.zeros(2)], os.system):
        torch.save(content, folder / "adapter_model.bin")
        refused(folder, tmp_path, "adapter_model.bin", allow_pickle=True)
    (folder / "adapter_model.bin").write_bytes(b"damaged")
    refused(folder, tmp_path, "expected tensors saved by torch.save", allow_pickle=True)


@pytest.mark.parametrize("kind", ["expanded", "sparse", "meta"])
def test_pickled_tensors_that_claim_more_than_they_hold(whole, tmp_path, kind):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
    key = next(iter(read_source(whole).tensors))
    tensor = {
        "expanded": lambda: torch.zeros(1).expand(10**9),
        "sparse": lambda: torch.zeros(2, 2).to_sparse(),
        "meta": lambda: torch.zeros(2, 2, device="meta"),
    }[kind]()
    torch.save({key: tensor}, folder / "adapter_model.bin")
    refused(folder, tmp_path, "is no dense tensor with a number for each element", allow_pickle=True)


def test_pickled_tensors_that_share_memory_are_written_apart(whole, tmp_path):
    tensors = dict(read_source(whole).tensors)
    first, second = (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(2))
    tensors[second] = tensors[first]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
    torch.save(tensors, folder / "adapter_model.bin")
    convert(folder, tmp_path / "out", "nvlabs", allow_pickle=True)
    assert torch.equal(read_source(tmp_path / "out").tensors[second], tensors[first])


def test_links(whole, tmp_path, monkeypatch):
    folder = tmp_path / "linked"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(whole / name)
    refused(folder, tmp_path, "a link that leads out of its folder")
    # the Hub's cache is made of links
    cache = tmp_path / "cache" / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (cache / "blobs" / name).write_bytes((whole / name).read_bytes())
        (cache / "snapshots" / "1" / name).symlink_to(cache / "blobs" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert read_source(cache / "snapshots" / "1").tensors


def test_several_files_and_none(whole, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    refused(folder, tmp_path, "holds no adapter.*found nothing")
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes((whole / "adapter_model.safetensors").read_bytes())
    refused(folder, tmp_path, "more than one file.*Name the file itself")
    assert read_source(folder / "a.safetensors").config is None


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "owner/name", "owner/name@v1", "no name"])
def test_names_that_are_nowhere(tmp_path, name):
    refused(name, tmp_path, "is no folder|There is no folder")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_factor_is_missing(whole, tmp_path, part):
    tensors = {key: t for key, t in read_source(whole).tensors.items() if not ("layers.1." in key and part in key)}
    refused(in_a_folder(whole, tmp_path, save(tensors)), tmp_path, rf"layers\.1\.self_attn\.q_proj' has .* no {part}")


def test_magnitudes_in_some_modules_only(whole, tmp_path):
    tensors = {key: t for key, t in read_source(whole).tensors.items() if not ("layers.1." in key and "magn" in key)}
    refused(in_a_folder(whole, tmp_path, save(tensors)), tmp_path, "magnitudes in some modules only")
