"""A .gguf of rows c W0 with llama.cpp's LoRA is the DoRA model over what the file's codes stand for."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_fixtures import llama, loaded, other, qwen, save_gguf, trained
from peft import PeftModel

import dora_peft
from dora_peft import reference
from dora_peft.adapters.export import export
from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.exact_gguf import ADAPTER, BASE, export_exact_gguf
from dora_peft.adapters.export.gguf_checkpoint import GgufCheckpoint
from dora_peft.adapters.formats import UnreadableError

MODELS = {
    "llama": (llama, "llama"),
    "tied llama": (lambda: llama(True), "llama"),
    "qwen2": (qwen, "qwen2"),
    "gemma2": (lambda: other("gemma2"), "gemma2"),
}


def made(tmp_path, case="llama", **options):
    """The base, and an adapter over it."""
    make, architecture = MODELS[case]
    path = save_gguf(make(), tmp_path / "model.gguf", architecture=architecture)
    return path, trained(path, tmp_path / "adapter", **options)


def opened(tmp_path, *adapters):
    return AdaptedBase(GgufCheckpoint(tmp_path / "model.gguf"), adapters or [tmp_path / "adapter"])


def logits(model):
    with torch.no_grad(), dora_peft.implementation("torch"):
        return model.eval()(torch.arange(10)[None]).logits


def factors(path, architecture="llama"):
    """B A by the module's name in the file, with the rows of q and k as Hugging Face has them, and alpha / rank."""
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {
        one.name: torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type), np.float32))
        for one in reader.tensors
    }
    found = {}
    for name, lora_A in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        stem = name.removesuffix(".weight.lora_a")
        product = tensors[f"{stem}.weight.lora_b"] @ lora_A * (alpha / len(lora_A))
        heads = {"attn_q": 4, "attn_k": 2}.get(stem.split(".")[-1])
        if architecture == "llama" and heads is not None:
            product = product.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        found[stem] = product
    return found


def served(out, architecture="llama"):
    """The exported files by transformers and gguf's own reader, without this package: the LoRA is added by hand."""
    model = loaded(out / BASE)
    names = gguf.get_tensor_name_map(
        next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), 2
    )
    added = factors(out / ADAPTER, architecture)
    with torch.no_grad():
        for path, module in model.named_modules():
            name = names.get_name(path)
            if name in added:
                module.weight += added.pop(name)
    assert not added
    return model


@pytest.mark.parametrize("case", MODELS)
def test_outputs_are_those_of_the_dora_model(tmp_path, case):
    path, adapter = made(tmp_path, case)
    expected = logits(PeftModel.from_pretrained(loaded(path), adapter))
    base = logits(loaded(path))
    done = export_exact_gguf(opened(tmp_path), tmp_path / "out")
    found = logits(served(tmp_path / "out", MODELS[case][1]))
    update = (expected - base).abs().max()
    # fp16 rounds scales by 2^-11, and the rows that are in bf16 by 2^-9
    assert (found - expected).abs().max() < 0.25 * update
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [ADAPTER, BASE]
    assert done.files == [tmp_path / "out" / name for name in (ADAPTER, BASE)]
    assert done.rank == 4


@pytest.mark.parametrize("case", MODELS)
def test_in_fp32_nothing_is_lost(tmp_path, case):
    """A c in another row's place would be as large as what 16 bits round."""
    make, architecture = MODELS[case]
    path = save_gguf(make(), tmp_path / "model.gguf", "F32", architecture)
    expected = logits(PeftModel.from_pretrained(loaded(path), trained(path, tmp_path / "adapter")))
    done = export_exact_gguf(opened(tmp_path), tmp_path / "out", dtype=torch.float32)
    assert (logits(served(tmp_path / "out", architecture)) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert max(loss.error_over_update for loss in done.losses.values()) < 1e-4


def test_the_losses_are_those_of_the_files(tmp_path):
    """Measured again in fp64 from the files, W' by the reference."""
    path, _ = made(tmp_path)
    done = export_exact_gguf(opened(tmp_path), tmp_path / "out")
    before, after, rows = loaded(path), served(tmp_path / "out"), loaded(tmp_path / "out" / BASE)
    tensors = {key: tensor.double() for key, tensor in opened(tmp_path).sources[0].tensors.items()}
    assert len(done.losses) == 14
    for name, loss in done.losses.items():
        weight = before.get_submodule(name).weight.double()
        lora_A, lora_B, m = (
            tensors[f"base_model.model.{name}.{part}"]
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
        )
        target = reference.dora_weight(weight, lora_A, lora_B, m, 3.0)
        error = (after.get_submodule(name).weight.double() - target).norm().item()
        assert loss.error == pytest.approx(error, rel=1e-2), name
        assert loss.update == pytest.approx((target - weight).norm().item(), rel=1e-3), name
        assert loss.rows == len(m)
        assert loss.lost == int((rows.get_submodule(name).weight == before.get_submodule(name).weight).all(1).sum())


def test_codes_and_other_tensors_stay(tmp_path):
    path, _ = made(tmp_path, target_modules=["up_proj"])
    export_exact_gguf(opened(tmp_path), tmp_path / "out")
    new = {one.name: one for one in gguf.GGUFReader(tmp_path / "out" / BASE).tensors}
    for one in gguf.GGUFReader(path).tensors:
        if "ffn_up" not in one.name:
            assert np.array_equal(one.data, new[one.name].data)
            continue
        # Q4_0: two bytes of scale, and 16 of codes
        rows, scaled = (tensor.data.reshape(-1, 18) for tensor in (one, new[one.name]))
        assert np.array_equal(rows[:, 2:], scaled[:, 2:])
        assert not np.array_equal(rows[:, :2], scaled[:, :2])


def test_several_adapters_in_their_order(tmp_path):
    path, first = made(tmp_path)
    second = trained(path, tmp_path / "second", r=2, target_modules=["q_proj", "up_proj"])
    model = PeftModel.from_pretrained(loaded(path), first)
    model.load_adapter(second, "second")
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    done = export_exact_gguf(opened(tmp_path, first, second), tmp_path / "out", dtype=torch.float32)
    assert (logits(served(tmp_path / "out")) - expected).abs().max() < 1e-2 * expected.abs().max()
    # no list of ranks binds llama.cpp
    assert done.rank == 6


def test_magnitudes_alone_need_no_adapter(tmp_path):
    path, adapter = made(tmp_path, target_modules=[], magnitude_only_modules=["up_proj"])
    done = export_exact_gguf(opened(tmp_path), tmp_path / "out")
    assert done.rank == 0
    assert [one.name for one in (tmp_path / "out").iterdir()] == [BASE]
    expected = logits(PeftModel.from_pretrained(loaded(path), adapter))
    assert (logits(loaded(tmp_path / "out" / BASE)) - expected).abs().max() < 1e-2 * expected.abs().max()


def test_a_dry_run_measures_alone(tmp_path):
    made(tmp_path)
    said = export_exact_gguf(opened(tmp_path), tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model.gguf"]
    done = export_exact_gguf(opened(tmp_path), tmp_path / "out")
    assert (said.losses, said.notes, said.rank, said.files) == (done.losses, done.notes, done.rank, [])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        ("qwen2", {"bias": "all"}, r"also trained 'model\.layers\.0\.self_attn\.[qkv]_proj\.bias'"),
        ("llama", {"modules_to_save": ["lm_head"]}, r"also trained 'lm_head\.weight' \(1 such"),
        ("llama", {"trainable_token_indices": [1, 3]}, r"also trained 'model\.embed_tokens\.weight'"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, r"'model\.embed_tokens"),
        ("tied llama", {"target_modules": ["lm_head", "q_proj"]}, r"lm_head"),
    ],
)
def test_what_such_files_do_not_hold_is_named(tmp_path, case, options, said):
    made(tmp_path, case, **options)
    with pytest.raises(UnreadableError, match=said) as error:
        export_exact_gguf(opened(tmp_path), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "in safetensors" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model.gguf"]


def test_a_head_of_its_own_is_a_module_like_others(tmp_path):
    path, adapter = made(tmp_path, target_modules=["lm_head", "q_proj"])
    expected = logits(PeftModel.from_pretrained(loaded(path), adapter))
    export_exact_gguf(opened(tmp_path), tmp_path / "out")
    assert (logits(served(tmp_path / "out")) - expected).abs().max() < 1e-2 * expected.abs().max()


def test_only_such_an_export_is_replaced(tmp_path):
    path, adapter = made(tmp_path)
    out = tmp_path / "out"
    export(adapter, path, out, "exact")
    before = {one.name: one.read_bytes() for one in out.iterdir()}
    assert sorted(before) == [ADAPTER, BASE, "dora_export.json"]
    with pytest.raises(FileExistsError, match="--force"):
        export(adapter, path, out, "exact")
    export(adapter, path, out, "exact", force=True, dtype=torch.float32)
    assert (out / ADAPTER).read_bytes() != before[ADAPTER]
    assert (out / BASE).read_bytes() == before[BASE]
    (out / "mine.txt").write_text("mine")
    for target in (out, tmp_path / "adapter"):
        with pytest.raises(FileExistsError, match="is no export of a"):
            export(adapter, path, target, "exact", force=True)
    with pytest.raises(FileExistsError, match="holds the base model"):
        export(adapter, path, tmp_path, "exact", force=True)
    with pytest.raises(ValueError, match="is no folder"):
        export(adapter, path, path / "below", "exact")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "model.gguf", "out"]


@pytest.mark.parametrize("force", [False, True])
def test_it_is_complete_or_as_it_was(tmp_path, monkeypatch, force):
    path, adapter = made(tmp_path)
    out = tmp_path / "out"
    if force:
        export(adapter, path, out, "exact")
    before = {one.name: one.read_bytes() for one in out.iterdir()} if force else {}

    def broken(*_, **__):
        raise OSError("no space left")

    for name in ("write_gguf", "rewrite_gguf", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dora_peft.adapters.export.exact_gguf.{name}", broken)
            with pytest.raises(OSError, match="no space left") as error:
                export(adapter, path, out, "exact", force=force, dtype=torch.float32)
        assert "\n" not in str(error.value)
        assert out.exists() == force
        assert ({one.name: one.read_bytes() for one in out.iterdir()} if force else {}) == before
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_the_record_says_how_exact_it_is(tmp_path):
    path, adapter = made(tmp_path)
    done = export(adapter, path, tmp_path / "out", "exact", command="as typed")
    stored = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert stored["modules"] == done.modules
    assert stored["command"] == "as typed"
    assert "up to rounding of W0" in stored["statement"]
    assert 0 < done.totals["error_over_update"] < 0.1
    assert stored["notes"] == [f"{ADAPTER} belongs to {BASE} alone: over another file it is another adapter"]
