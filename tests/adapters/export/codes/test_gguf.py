"""A .gguf with rows times c: what llama.cpp's own package and transformers read from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from codes_fixtures import some_c
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dora_peft.adapters.export.codes.gguf import PLACES, rewrite_gguf, scaled_rows
from dora_peft.adapters.export.codes.gguf_file import AS_THEY_ARE, FLOATS, INTERLEAVED, GgufFile
from dora_peft.adapters.formats import UnreadableError

gguf = pytest.importorskip("gguf")

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 12, 512


def blocks(kind, rows=ROWS, columns=COLUMNS):
    """Random rows of a type, as bytes, whose scales are numbers."""
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in PLACES.get(kind, ()):
        scales = np.random.default_rng(at).normal(0, 0.02, data.shape[:2]).astype(np.float16)
        data[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
    if kind in FLOATS:
        numbers = torch.randn(rows, columns).to(FLOATS[kind])
        return numbers.view(torch.uint8).numpy()
    return data.reshape(rows, -1)


def written(path, tensors, architecture="qwen2", **numbers):
    """A .gguf of tensors by name, (type, rows of bytes)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    reader = gguf.GGUFReader(path)
    return {
        one.name: torch.from_numpy(gguf.quants.dequantize(np.array(one.data), one.tensor_type).copy())
        for one in reader.tensors
    }


@pytest.mark.parametrize("kind", [*PLACES, "F32", "F16", "BF16"])
def test_rows_are_times_c_up_to_rounding_and_the_rest_is_the_same(tmp_path, kind):
    tensors = {"blk.0.ffn_up.weight": (kind, blocks(kind)), "blk.0.ffn_down.weight": (kind, blocks(kind))}
    source = written(tmp_path / "a.gguf", tensors)
    c = some_c(ROWS, sign=True)
    report = rewrite_gguf(source, tmp_path / "b.gguf", {UP: c})
    assert report[UP].tensor == "blk.0.ffn_up.weight"
    assert report[UP].kind == kind
    assert report[UP].lost == 0
    before, after = read(source), read(tmp_path / "b.gguf")
    assert torch.equal(before["blk.0.ffn_down.weight"], after["blk.0.ffn_down.weight"])
    name = "blk.0.ffn_up.weight"
    expected = c[:, None] * before[name].double()
    # offsets and scales are rounded separately, and what they add up to may be smaller than both
    eps = torch.finfo(FLOATS.get(kind, torch.float16)).eps
    assert ((after[name] - expected).abs() <= eps * before[name].abs().amax(1, keepdim=True) * 2).all()
    assert not torch.equal(after[name], before[name])
    different = np.flatnonzero(np.fromfile(source, np.uint8) != np.fromfile(tmp_path / "b.gguf", np.uint8))
    tensor = next(one for one in gguf.GGUFReader(source).tensors if one.name == name)
    inside = different - tensor.data_offset
    assert len(inside)
    assert (inside >= 0).all()
    assert (inside < tensor.n_bytes).all()
    if kind in PLACES:
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        assert set(inside % size) <= {at + i for at in PLACES[kind] for i in (0, 1)}


@pytest.mark.parametrize("kind", [*PLACES, "F32", "F16", "BF16"])
def test_the_rows_of_the_new_file_are_known_before_it_is_written(tmp_path, kind):
    source = written(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (kind, blocks(kind))})
    c = some_c(ROWS, sign=True)
    found = scaled_rows(GgufFile(source), UP, c)
    rewrite_gguf(source, tmp_path / "b.gguf", {UP: c})
    assert torch.equal(found, read(tmp_path / "b.gguf")["blk.0.ffn_up.weight"])
    assert not torch.equal(found, read(source)["blk.0.ffn_up.weight"])


@given(c=st.lists(st.floats(-2, 2), min_size=ROWS, max_size=ROWS))
@settings(max_examples=20, deadline=None)
def test_the_share_of_rows_whose_c_was_lost(tmp_path_factory, c):
    folder = tmp_path_factory.mktemp("lost")
    data = blocks("Q4_0", columns=32)
    data[0] = 0
    source = written(folder / "a.gguf", {"blk.0.ffn_up.weight": ("Q4_0", data)})
    found = rewrite_gguf(source, folder / "b.gguf", {UP: torch.tensor(c)})[UP].lost
    scales = torch.from_numpy(data[:, :2].copy()).view(torch.float16)[:, 0]
    times = torch.tensor(c)
    same = (scales.double() * times.double()).half() == scales
    assert found == int((same & (times != 1) & (scales != 0)).sum()) / ROWS


def test_llamas_q_and_k_take_c_in_the_order_of_their_rows(tmp_path):
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=8, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    heads = {"q_proj": 4, "k_proj": 2}
    tensors = {}
    for key, value in model.state_dict().items():
        part = key.split(".")[-2]
        if part in heads:
            # as llama.cpp's converter has it
            value = value.view(heads[part], 2, -1, 32).swapaxes(1, 2).reshape(value.shape)
        tensors[names.get_name(key, (".weight",))] = ("F32", value.contiguous().numpy())
    source = written(
        tmp_path / "a.gguf", tensors, "llama", head_count=4, head_count_kv=2, embedding_length=32,
        feed_forward_length=64, context_length=64, vocab_size=8, layer_norm_rms_eps=1e-6, rope_dimension_count=8,
    )  # fmt: skip
    rows = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    paths = {f"model.layers.{i}.self_attn.{part}": count for i in (0, 1) for part, count in rows.items()}
    scales = {path: some_c(count, sign=True).float() for path, count in paths.items()}
    scales["lm_head"] = some_c(8).float()
    rewrite_gguf(source, tmp_path / "b.gguf", scales)
    for path, c in scales.items():
        expected = (model.state_dict()[f"{path}.weight"].double() * c.double()[:, None]).float()
        assert torch.equal(scaled_rows(GgufFile(source), path, c), expected), path
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="b.gguf", dtype=torch.float32)
    for key, value in model.state_dict().items():
        c = scales.get(key.removesuffix(".weight"))
        expected = value if c is None else (value.double() * c.double()[:, None]).float()
        assert torch.equal(found.state_dict()[key], expected), key


def small(tmp_path, kind="Q8_0", architecture="qwen2", **more):
    tensors = {"blk.0.ffn_up.weight": (kind, blocks(kind)), "token_embd.weight": ("F32", blocks("F32"))}
    return written(tmp_path / "a.gguf", {**tensors, **more}, architecture)


@pytest.mark.parametrize(
    ("path", "c", "found"),
    [
        (DOWN, torch.ones(ROWS), "no rows for c by the name 'blk.0.ffn_down.weight'"),
        ("model.layers.0.other", torch.ones(ROWS), r"name 'model.layers.0.other.weight'"),
        ("lm_head", torch.ones(ROWS), "tied to the embedding"),
        ("model.embed_tokens", torch.ones(ROWS), "leave the module out"),
        (UP, torch.ones(ROWS + 1), r"c of shape \[13\] for a tensor \[12, 512\]"),
        (UP, torch.full((ROWS,), float("nan")), "finite"),
        (UP, torch.full((ROWS,), 1e9), r"expected at most 6.55e\+04"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(tmp_path, path, c, found):
    source = small(tmp_path)
    with pytest.raises(UnreadableError, match=found):
        scaled_rows(GgufFile(source), path, c)
    with pytest.raises(UnreadableError, match=found) as error:
        rewrite_gguf(source, tmp_path / "b.gguf", {path: c})
    assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]


def test_other_types_architectures_and_files_are_refused(tmp_path):
    with pytest.raises(UnreadableError, match="its type is MXFP4: expected one of Q4_0"):
        rewrite_gguf(small(tmp_path, "MXFP4"), tmp_path / "b.gguf", {UP: torch.ones(ROWS)})
    with pytest.raises(UnreadableError, match="architecture 'bloom'"):
        rewrite_gguf(small(tmp_path, architecture="bloom"), tmp_path / "b.gguf", {UP: torch.ones(ROWS)})
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"other things that are no file of llama.cpp's"):
        broken.write_bytes(content)
        with pytest.raises(UnreadableError, match=r"broken.gguf"):
            rewrite_gguf(broken, tmp_path / "b.gguf", {UP: torch.ones(ROWS)})
    source = small(tmp_path)
    with pytest.raises(UnreadableError, match="base itself"):
        rewrite_gguf(source, Path(source), {UP: torch.ones(ROWS)})


def test_every_place_and_architecture_is_one_of_the_packages():
    assert {gguf.GGMLQuantizationType[kind] for kind in PLACES} <= set(gguf.GGML_QUANT_SIZES)
    assert {*AS_THEY_ARE, *INTERLEAVED} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_c_in_the_scales_keeps_an_update_that_quantising_again_loses(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_0
    data = gguf.quants.quantize(torch.randn(64, COLUMNS).numpy(), kind)
    source = written(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": ("Q4_0", data)})
    before = read(source)["blk.0.ffn_up.weight"].double()
    change = torch.randn(64, 4).double() @ torch.randn(4, COLUMNS).double()
    change *= 0.01 * before.norm() / change.norm()
    c = some_c(64, spread=4e-4)
    merged = c[:, None] * (before + change)
    update = (merged - before).norm()
    again = gguf.quants.dequantize(gguf.quants.quantize(merged.float().numpy(), kind), kind)
    assert (torch.from_numpy(again) - merged).norm() > 0.9 * update
    rewrite_gguf(source, tmp_path / "b.gguf", {UP: c})
    exact = read(tmp_path / "b.gguf")["blk.0.ffn_up.weight"].double() + c[:, None] * change
    assert (exact - merged).norm() < 0.04 * update
