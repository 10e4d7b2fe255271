"""Every format is told by its keys, and every pair of formats gives back what went in."""

import itertools

import pytest
import torch
from format_fixtures import NEEDS_BASE, adapter, base_for, effective, module, ulps
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_peft.adapters.formats import (
    FORMATS,
    Adapter,
    Base,
    UnreadableError,
    format_of,
    read_source,
    write_files,
)

# Where a factor is folded in or divided out: into B, into m.
WITH_CONVOLUTIONS = ("peft", "lycoris", "onetrainer", "ai-toolkit", "comfyui-2026")
FOLDS_B, FOLDS_M = ("ai-toolkit",), ("trtllm", "comfyui-2026")


def through(tmp_path, name, given_adapter, base):
    """Write as one format, and read what is there."""
    files = FORMATS[name].write(given_adapter, base)
    target = tmp_path / name if files.json else tmp_path / f"{name}.safetensors"
    write_files(files, target, force=True)
    return FORMATS[name].read(read_source(target), base)


@settings(max_examples=12, deadline=None)
@given(
    columns=st.integers(1, 17),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1, 3.0, 16, 0.1, 2**0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_there_and_back(tmp_path_factory, first, second, columns, rank, alpha, dtype, seed):
    made = adapter(columns, rank, alpha, dtype, seed)
    base = Base(base_for(made, seed))
    folder = tmp_path_factory.mktemp("formats")
    once = through(folder, first, made, base)
    found = through(folder, first, through(folder, second, once, base), base)
    assert sorted(found.modules) == sorted(made.modules)
    used = {first, second}
    for path, one in found.modules.items():
        wanted = made.modules[path]
        assert torch.equal(one.lora_A, wanted.lora_A)
        assert one.lora_B.dtype is one.magnitude.dtype is dtype
        if used & set(FOLDS_B):
            assert one.scaling == 1
            folded = (wanted.lora_B.double() * wanted.scaling).to(dtype)
            assert ulps(one.lora_B, folded) <= 4
        else:
            assert torch.equal(one.lora_B, wanted.lora_B)
            assert one.scaling == pytest.approx(wanted.scaling, rel=1e-15)
        if not used & set(FOLDS_M):
            assert torch.equal(one.magnitude, wanted.magnitude)
        elif used & set(FOLDS_B) and dtype is not torch.float32:
            # the norms are those of the rounded B
            assert torch.allclose(one.magnitude.double(), wanted.magnitude.double(), rtol=8 * torch.finfo(dtype).eps)
        else:
            assert ulps(one.magnitude, wanted.magnitude) <= 4


@settings(max_examples=4, deadline=None)
@given(
    out=st.integers(1, 9), columns=st.integers(1, 7), rank=st.integers(1, 5),
    kernel=st.sampled_from([(1,), (3,), (1, 1), (3, 2)]), seed=st.integers(0, 1000),
)  # fmt: skip
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(WITH_CONVOLUTIONS, 2)))
def test_convolutions(tmp_path_factory, first, second, out, columns, rank, kernel, seed):
    made = Adapter({"blocks.0.conv": module(out, columns, rank, 2.0, kernel=kernel, seed=seed)})
    base = Base(base_for(made, seed))
    folder = tmp_path_factory.mktemp("formats")
    once = through(folder, first, made, base)
    found = through(folder, second, once, base).modules["blocks.0.conv"]
    wanted, weight = made.modules["blocks.0.conv"], base.weight("blocks.0.conv", made.modules["blocks.0.conv"]).dense()
    assert found.lora_A.shape == wanted.lora_A.shape
    assert found.magnitude.shape == (out,)
    torch.testing.assert_close(effective(weight, found), effective(weight, wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["nvlabs", "mlx", "torchtune"])
def test_convolutions_are_refused_by_name(name):
    made = Adapter({"model.layers.0.self_attn.v_proj": module(6, 5, 3, 2.0, kernel=(3,))})
    with pytest.raises(UnreadableError, match=r"module 'model\.layers\.0\.self_attn\.v_proj' is none"):
        FORMATS[name].write(made, Base(base_for(made)))


@pytest.mark.parametrize("name", ["nvlabs", "mlx", "torchtune"])
def test_several_ranks_or_alphas_are_refused_by_name(name):
    made = adapter(5, 3, 2.0)
    made.modules["model.layers.0.self_attn.v_proj"] = module(7, 5, 2, 2.0)
    with pytest.raises(UnreadableError, match=f"{name} has one rank and one alpha"):
        FORMATS[name].write(made, Base(base_for(made)))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("peft", "nvlabs", "trtllm")])
def test_other_trained_tensors_are_refused_by_name(name):
    made = adapter(5, 3, 2.0)
    made.others["lm_head.weight"] = torch.zeros(3, 2)
    with pytest.raises(UnreadableError, match=r"also has 'lm_head\.weight'"):
        FORMATS[name].write(made, Base(base_for(made)))


@pytest.mark.parametrize("name", NEEDS_BASE)
def test_the_base_is_asked_for(name):
    with pytest.raises(UnreadableError, match="with --base"):
        FORMATS[name].write(adapter(5, 3, 2.0), None)


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.recognises])
def test_told_by_keys(tmp_path, name):
    made = adapter(5, 3, 2.0)
    target = tmp_path / "adapter"
    write_files(FORMATS[name].write(made, Base(base_for(made))), target)
    assert format_of(read_source(target)) == name


def test_two_formats_in_one_file_and_none(tmp_path):
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    both = {**FORMATS["mlx"].write(made, base).tensors, **FORMATS["peft"].write(made, base).tensors}
    both = {key: tensor.clone() for key, tensor in both.items()}
    for tensors, said in ((both, "those of peft and mlx"), ({"a.weight": torch.zeros(2)}, "no known adapter's")):
        file = tmp_path / "adapter.safetensors"
        write_files(type(FORMATS["peft"].write(made, base))("x", tensors), file, force=True)
        with pytest.raises(UnreadableError, match=said):
            format_of(read_source(file))
