"""A .gguf's tensors, what they stand for, the order of their rows, and files that are not one."""

import sys

import gguf
import numpy as np
import pytest
import torch
from gguf_fixtures import llama, qwen, save_gguf

from dora_peft.adapters.export.codes.gguf_file import GgufFile
from dora_peft.adapters.formats import UnreadableError


def test_tensors_are_those_of_the_packages_reader(tmp_path):
    path = save_gguf(llama(), tmp_path / "a.gguf")
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    assert file.architecture == "llama"
    assert list(file.tensors) == [one.name for one in reader.tensors]
    for one in reader.tensors:
        found = file.tensors[one.name]
        assert (found.kind, found.nbytes) == (one.tensor_type.name, one.n_bytes)
        data = file.data(found)
        assert len(data) == found.rows
        expected = np.array(gguf.quants.dequantize(one.data, one.tensor_type), np.float32)
        assert found.shape == expected.shape
        assert np.array_equal(file.numbers(found, data).numpy(), expected)
    assert {found.kind for found in file.tensors.values()} == {"Q4_0", "Q8_0", "F16", "BF16", "F32"}


def test_rows_of_q_and_k_are_interleaved_in_llamas_files_alone(tmp_path):
    rows = torch.arange(32)
    file = GgufFile(save_gguf(llama(), tmp_path / "a.gguf"))
    # two heads of k: first of the first half, first of the second half ...
    assert file.in_order("blk.0.attn_k.weight", rows)[:4].tolist() == [0, 8, 1, 9]
    assert file.in_order("blk.0.attn_q.weight", rows)[:4].tolist() == [0, 4, 1, 5]
    for name in ("blk.0.attn_k.weight", "blk.1.attn_q.weight"):
        many = torch.randn(32, 3)
        assert torch.equal(file.in_models_order(name, file.in_order(name, many)), many)
    assert torch.equal(file.in_order("blk.0.attn_v.weight", rows), rows)
    other = GgufFile(save_gguf(qwen(), tmp_path / "b.gguf", architecture="qwen2"))
    assert torch.equal(other.in_order("blk.0.attn_k.weight", rows), rows)
    with pytest.raises(UnreadableError, match="of 30 rows has 4 heads"):
        file.in_order("blk.0.attn_q.weight", rows[:30])


def test_names_are_those_of_hugging_faces_modules(tmp_path):
    file = GgufFile(save_gguf(llama(), tmp_path / "a.gguf"))
    assert file.name_of("model.layers.1.self_attn.q_proj") == "blk.1.attn_q"
    assert file.name_of("model.embed_tokens") == "token_embd"
    assert file.name_of("model.layers.7.self_attn.q_proj") is None


def test_a_part_of_a_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(2)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnreadableError, match="is one of 3 files of a model: join them"):
        GgufFile(tmp_path / "a.gguf")


def test_what_is_cut_off_or_has_no_reader_is_one_line(tmp_path, monkeypatch):
    path = save_gguf(llama(), tmp_path / "a.gguf")
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[: file.tensors["output_norm.weight"].offset + 4])
    with pytest.raises(UnreadableError, match="ends within 'output_norm"):
        file.data(file.tensors["output_norm.weight"])
    with pytest.raises(UnreadableError, match="expected a whole"):
        GgufFile(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnreadableError, match="pip install gguf"):
        GgufFile(path)
