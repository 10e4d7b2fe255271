"""A base's files are read one tensor at a time, from one file or several, and what is no base is one line."""

import json

import pytest
import torch
from format_fixtures import llama
from safetensors import safe_open
from safetensors.torch import save_file

from dora_peft.adapters.formats import Checkpoint, UnreadableError
from dora_peft.adapters.formats.checkpoint import DTYPES, INDEX, Entry


@pytest.mark.parametrize("shards", ["1GB", "8KB"])
def test_all_tensors_of_all_files(tmp_path, shards):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    found = Checkpoint(tmp_path)
    assert (len(found.files()) > 1) == (shards == "8KB")
    assert found.config["model_type"] == "llama"
    assert found.metadata == {"format": "pt"}
    state = model.state_dict()
    assert found.entries.keys() == state.keys()
    for key, entry in found.entries.items():
        assert (entry.shape, entry.dtype, entry.nbytes) == (
            tuple(state[key].shape),
            state[key].dtype,
            state[key].nbytes,
        )
        assert torch.equal(found.tensor(key), state[key])
        with safe_open(tmp_path / entry.file, framework="pt") as file:
            assert key in file.keys()  # noqa: SIM118 - the file is no dictionary


def test_one_file_and_no_config(tmp_path):
    save_file({"a.weight": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "weights.safetensors")
    found = Checkpoint(tmp_path / "weights.safetensors")
    assert (found.folder, found.config, found.metadata) == (tmp_path, {}, {})
    assert found.entries == {"a.weight": Entry("weights.safetensors", (2, 3), torch.bfloat16)}


@pytest.mark.parametrize("dtype", sorted({*DTYPES.values()} - {torch.float4_e2m1fn_x2}, key=str), ids=str)
def test_dtypes_have_the_names_of_safetensors(tmp_path, dtype):
    save_file({"x": torch.zeros(4, dtype=torch.uint8).to(dtype)}, tmp_path / "x.safetensors")
    (entry,) = Checkpoint(tmp_path).entries.values()
    assert (entry.dtype, entry.nbytes) == (dtype, 4 * dtype.itemsize)


@pytest.mark.parametrize(
    ("name", "said"),
    [("../x.safetensors", r"its index names '\.\./x\.safetensors'"), ("absent.safetensors", "its index names 'absent")],
)
def test_an_index_names_files_of_the_folder_alone(tmp_path, name, said):
    (tmp_path / "base").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "base" / "x.safetensors")
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UnreadableError, match=said):
        Checkpoint(tmp_path / "base")


@pytest.mark.parametrize("what", ["empty", "damaged", "none", "index"])
def test_what_is_no_base(tmp_path, what):
    folder = tmp_path / "base"
    said = {"empty": "holds no base model", "damaged": "Cannot read the base's", "none": "is no folder",
            "index": "is not whole"}[what]  # fmt: skip
    if what != "none":
        folder.mkdir()
    if what == "damaged":
        (folder / "model.safetensors").write_bytes(b"12345678901")
    if what == "index":
        (folder / INDEX).write_text("{}")
    with pytest.raises(UnreadableError, match=said):
        Checkpoint(folder)


@pytest.mark.parametrize("entry", ["quantization_config", "compression_config", None])
def test_a_config_says_whether_weights_are_quantised(tmp_path, entry):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({} if entry is None else {entry: {"quant_method": "any"}}))
    assert Checkpoint(tmp_path).is_quantised == (entry is not None)
