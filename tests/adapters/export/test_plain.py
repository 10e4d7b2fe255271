"""One plain LoRA for all readers: ranks, padding, balance, dtypes, and what PEFT makes of the folder."""

import json

import pytest
import torch
from format_fixtures import llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from dora_peft.adapters.export.plain import (
    RANKS,
    Factors,
    check_rank,
    listed_rank,
    plain_adapter,
    plain_files,
    plain_modules,
)
from dora_peft.adapters.formats import UnreadableError, write_files

KINDS = {"dense": nn.Linear(12, 10), "table": nn.Embedding(20, 10), "conv": nn.Conv2d(3, 6, (2, 3), padding=1)}


class Kinds(nn.Module):
    """A layer of each kind that PEFT has."""

    def __init__(self):
        super().__init__()
        for name, layer in KINDS.items():
            self.add_module(name, layer)

    def forward(self, ids, x, image):
        return self.table(ids), self.dense(x), self.conv(image)


def factors(rank, scale=1.0):
    table, dense, conv = ((10, 20), (10, 12), (6, 18))
    shapes = {"table": table, "dense": dense, "conv": conv}
    return {
        path: Factors(
            scale * torch.randn(rank, columns), torch.randn(out, rank) / scale, path == "table",
            (3, 2, 3) if path == "conv" else (),
        )
        for path, (out, columns) in shapes.items()
    }  # fmt: skip


def folder(tmp_path, own, dtype=torch.float32, **options):
    files, notes = plain_adapter(own, dtype, "some/base", **options)
    write_files(files, tmp_path / "adapter")
    return tmp_path / "adapter", notes


@pytest.mark.parametrize(("rank", "chosen"), [(3, None), (8, None), (3, 8), (3, 64), (8, 512)])
def test_peft_computes_what_the_factors_say_at_every_padding(tmp_path, rank, chosen):
    own = factors(rank)
    path, notes = folder(tmp_path, own, rank=chosen)
    ids, x, image = torch.arange(20), torch.randn(5, 12), torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        before = Kinds()(ids, x, image)
        after = PeftModel.from_pretrained(Kinds(), path)(ids, x, image)
        deltas = {name: one.lora_B @ one.lora_A for name, one in own.items()}
        expected = (
            deltas["table"].T[ids], x @ deltas["dense"].T,
            nn.functional.conv2d(image, deltas["conv"].view(6, 3, 2, 3), padding=1),
        )  # fmt: skip
    for old, new, delta in zip(before, after, expected, strict=True):
        assert delta.abs().max() > 1
        assert torch.allclose(new - old, delta, atol=1e-4)
    assert not notes
    assert json.loads((path / "adapter_config.json").read_text())["r"] == (chosen or 8)


def test_every_reader_takes_the_same_scaling_from_the_config(tmp_path):
    path, _ = folder(tmp_path, factors(3))
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    # SGLang's and PEFT's, and llama.cpp's of each tensor
    ranks = {len(t) if "_A" in key else t.shape[1] for key, t in tensors.items()}
    assert {config["lora_alpha"] / rank for rank in (config["r"], *ranks)} == {1.0}
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (False, False, "none")
    assert (config["modules_to_save"], config["peft_type"]) == (None, "LORA")
    assert sorted(config["target_modules"]) == ["conv", "dense", "table"]
    assert config["base_model_name_or_path"] == "some/base"
    assert config.keys() <= LoraConfig().to_dict().keys()
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_a_revision_of_the_base_is_an_entry_of_its_own():
    """PEFT loads no "owner/name@revision"."""
    modules, _ = plain_modules({"layer": Factors(torch.ones(1, 4), torch.ones(4, 1))}, 1)
    for name, expected in (("owner/name@v1", ("owner/name", "v1")), ("owner/name", ("owner/name", None))):
        config = plain_files(modules, name).json["adapter_config.json"]
        assert (config["base_model_name_or_path"], config["revision"]) == expected


def test_a_name_that_ends_others_names_is_none_of_them(tmp_path):
    model = llama()
    path = "model.layers.1.self_attn.q_proj"
    out, columns = model.get_submodule(path).weight.shape
    own = {path: Factors(torch.randn(2, columns), torch.randn(out, 2))}
    loaded = PeftModel.from_pretrained(model, folder(tmp_path, own)[0])
    assert [name for name, _ in loaded.named_modules() if name.endswith("lora_A")] == [
        f"base_model.model.{path}.lora_A"
    ]


@given(st.integers(-40, 40), st.integers(1, 5))
def test_balancing_rounds_nothing(power, rank):
    own = Factors(torch.randn(rank, 7) * 2.0**power, torch.randn(9, rank))
    new = own.rounded(torch.float32)
    assert torch.equal(new.lora_B.double() @ new.lora_A.double(), own.lora_B.double() @ own.lora_A.double())
    sizes = new.lora_A.square().mean(1).sqrt() / new.lora_B.square().mean(0).sqrt()
    assert sizes.log2().abs().max() <= 1.001


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_fp16_resolves_both_factors_whatever_their_sizes_were(size):
    own = Factors(torch.randn(4, 30) * size, torch.randn(20, 4) / size)
    new = own.rounded(torch.float16)
    assert new.lora_A.dtype == new.lora_B.dtype == torch.float16
    exact = own.lora_B.double() @ own.lora_A.double()
    assert (new.lora_B.double() @ new.lora_A.double() - exact).norm() < 1e-3 * exact.norm()


def test_what_overflows_is_written_in_fp32_with_a_note(tmp_path):
    own = factors(3)
    own["dense"] = Factors(own["dense"].lora_A * 1e6, own["dense"].lora_B * 1e6)
    path, notes = folder(tmp_path, own, torch.float16)
    tensors = load_file(path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert notes == ["warning: the adapter is in fp32: float16 overflows in 'dense' (1 of 3 modules)"]


def test_components_of_zero_stay_zero():
    own = Factors(torch.randn(3, 5), torch.randn(4, 3))
    own.lora_A[1] = 0
    own.lora_B[:, 2] = 0
    new = own.rounded(torch.float16)
    assert torch.isfinite(new.lora_A).all()
    assert not new.lora_A[1:].any()
    assert not new.lora_B[:, 1:].any()
    assert new.lora_A[0].any()


@pytest.mark.parametrize(("rank", "listed"), [(1, 1), (2, 8), (8, 8), (257, 320), (512, 512)])
def test_ranks_are_those_of_vllm(rank, listed):
    assert listed_rank(rank) == listed
    if rank == listed:
        check_rank(rank)
    else:
        with pytest.raises(UnreadableError, match=f"--rank {rank}: .*1 8 16 32 64 128 256 320 512; choose {listed}"):
            check_rank(rank)


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_ranks_out_of_reach_are_refused(rank):
    with pytest.raises(UnreadableError, match="choose one of them"):
        check_rank(rank)


@pytest.mark.parametrize(
    ("own", "options", "words"),
    [
        ({}, {}, "changes no module"),
        ({"x": Factors(torch.ones(RANKS[-1] + 1, 2), torch.ones(2, RANKS[-1] + 1))}, {}, "more than the 512"),
        ({"x": Factors(torch.ones(9, 2), torch.ones(2, 9))}, {"rank": 8}, "'x' has rank 9: expected at most 8"),
        ({"x": Factors(torch.full((1, 2), torch.nan), torch.ones(2, 1))}, {}, "'x' holds NaN"),
        ({"x": Factors(torch.full((1, 2), torch.inf), torch.ones(2, 1))}, {}, "'x' holds NaN or infinite"),
    ],
)
def test_what_is_no_plain_lora_is_refused(own, options, words):
    with pytest.raises(UnreadableError, match=words):
        plain_adapter(own, torch.float32, "base", **options)
