"""`dora_peft.adapters.convert` on saved folders: outputs, dry runs, targets, and what it refuses."""

import json
import os

import pytest
import torch
from format_fixtures import llama, logits, saved
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dora_peft.adapters import FORMATS, UnreadableError, convert

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    return saved(tmp_path_factory.mktemp("saved") / "adapter", target_modules=targets)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    target = tmp_path_factory.mktemp("base") / "llama"
    llama().save_pretrained(target)
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_survive_the_way_there_and_back(tmp_path, folder, base, name):
    options = {"base": base, "source_format": name}
    convert(folder, tmp_path / "there", name, base=base)
    done = convert(tmp_path / "there", tmp_path / "back", "peft", **options)
    assert (done.source, done.target, done.modules) == (name, "peft", 8)
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["peft", "nvlabs", "lycoris"])
def test_tensors_survive_bit_for_bit(tmp_path, folder, base, name):
    convert(folder, tmp_path / "there", name)
    convert(tmp_path / "there", tmp_path / "back", "peft", base=base)
    before, after = (load_file(where / "adapter_model.safetensors") for where in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_patterns_and_rslora(tmp_path, base):
    options = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 7}, "use_rslora": True}
    folder = saved(tmp_path / "adapter", **options)
    convert(folder, tmp_path / "there", "lycoris")
    convert(tmp_path / "there", tmp_path / "back", "peft")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), rtol=1e-5, atol=1e-5)


def test_modules_to_save_travel_between_folders_of_peft_keys_alone(tmp_path):
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    convert(folder, tmp_path / "there", "nvlabs")
    convert(tmp_path / "there", tmp_path / "back", "peft")
    assert torch.equal(logits(tmp_path / "back"), logits(folder))
    with pytest.raises(UnreadableError, match=r"mlx.*also has 'lm_head\.weight'"):
        convert(folder, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("given", ["files", "model"])
def test_a_plain_lora_becomes_a_dora_with_the_same_outputs(tmp_path, base, given):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(UnreadableError, match=r"plain LoRA.*--to dora"):
        convert(tmp_path / "lora", tmp_path / "mlx", "mlx")
    with pytest.raises(UnreadableError, match="with --base"):
        convert(tmp_path / "lora", tmp_path / "dora", "dora")
    convert(tmp_path / "lora", tmp_path / "dora", "dora", base=base if given == "files" else llama())
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    torch.testing.assert_close(logits(tmp_path / "dora"), logits(tmp_path / "lora"), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnreadableError, match="is DoRA already"):
        convert(tmp_path / "dora", tmp_path / "again", "dora", base=base)


def test_dtype_of_what_is_written(tmp_path, folder):
    done = convert(folder, tmp_path / "half", "lycoris", dtype=torch.bfloat16)
    assert [note.split(",")[0] for note in done.notes] == ["magnitudes are in 16 bits"]
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {torch.bfloat16}


def test_a_dry_run_says_what_would_be_written(tmp_path, folder):
    told = convert(folder, tmp_path / "out", "mlx", dry_run=True)
    assert not (tmp_path / "out").exists()
    done = convert(folder, tmp_path / "out", "mlx")
    assert told.files == done.files
    assert told.nbytes == done.nbytes == sum(t.nbytes for t in load_file(done.files[0]).values())
    assert told.free > 0


def test_what_is_there_is_replaced_by_force_alone_and_as_a_whole(tmp_path, folder):
    target = tmp_path / "out"
    convert(folder, target, "mlx")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(FileExistsError, match="--force"):
        convert(folder, target, "nvlabs")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    convert(folder, target, "nvlabs", force=True)
    assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_one_file(tmp_path, folder):
    done = convert(folder, tmp_path / "lycoris.safetensors", "lycoris")
    assert done.files == [tmp_path / "lycoris.safetensors"]
    with pytest.raises(ValueError, match=r"is one file, and adapter_config.json belongs to it"):
        convert(folder, tmp_path / "mlx.safetensors", "mlx")


@pytest.mark.parametrize("moment", ["tensors", "rename"])
def test_a_failure_leaves_what_was_there(tmp_path, folder, moment, monkeypatch):
    target = tmp_path / "out"
    convert(folder, target, "mlx")
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "tensors":
        monkeypatch.setattr("dora_peft.adapters.formats.files.save_file", full)
    else:
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: full() if str(a).endswith("new") else replace(a, b))
    with pytest.raises(OSError, match=r"Could not save the adapter.*No space left.*Nothing was written"):
        convert(folder, target, "nvlabs", force=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_base_is_refused_before_anything_is_written(tmp_path, folder):
    other = llama()
    other.model.layers[0].mlp.down_proj = torch.nn.Linear(3, 5)
    with pytest.raises(UnreadableError, match=r"another base.*'model\.layers\.0\.mlp\.down_proj'.*24 x 40"):
        convert(folder, tmp_path / "out", "trtllm", base=other)
    other = llama()
    del other.model.layers[0].self_attn.q_proj
    with pytest.raises(UnreadableError, match=r"has no module 'model\.layers\.0\.self_attn\.q_proj'"):
        convert(folder, tmp_path / "out", "trtllm", base=other)
    assert not (tmp_path / "out").exists()


def column_normed(folder, tmp_path, scale_of):
    """A LyCORIS file of the folder, its dora_scale as `scale_of` says by name."""
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    tensors = load_file(tmp_path / "a.safetensors")
    changed = {k: scale_of(k, tensors) if k.endswith("dora_scale") else t for k, t in tensors.items()}
    save_file(changed, tmp_path / "b.safetensors")
    return tmp_path / "b.safetensors"


def test_norms_per_input_column_are_refused_or_refitted(tmp_path, base):
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"], r=24)
    layers = dict(llama().named_modules())

    def scale_of(key, tensors):
        name = key.removesuffix(".dora_scale")
        path = next(p for p in layers if p.replace(".", "_") == name.removeprefix("lycoris_"))
        change = 3 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / 6
        return torch.linalg.vector_norm(layers[path].weight.detach() + change, dim=0)[None]

    file = column_normed(folder, tmp_path, scale_of)
    with pytest.raises(UnreadableError, match=r"norm per input column.*--refit"):
        convert(file, tmp_path / "out", "peft", base=base)
    done = convert(file, tmp_path / "out", "peft", base=base, refit=True)
    assert [note.split(":")[0] for note in done.notes] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    # of full rank, whatever a norm per column gives can be had
    assert all(float(note.split()[-1]) < 1e-5 for note in done.notes)


def test_a_scale_of_one_dimension_on_a_square_layer_is_ambiguous(tmp_path, base):
    folder = saved(tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    file = column_normed(folder, tmp_path, lambda key, tensors: tensors[key].flatten())
    with pytest.raises(UnreadableError, match=r"is square and its dora_scale.*--axis"):
        convert(file, tmp_path / "out", "peft", base=base)
    convert(file, tmp_path / "out", "peft", base=base, axis="output")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder))


def test_axis_belongs_to_dora_scale(tmp_path, folder):
    with pytest.raises(UnreadableError, match="--axis and --refit"):
        convert(folder, tmp_path / "out", "mlx", axis="output")


@pytest.mark.parametrize("extra", ["lora_mid.weight", "hada_w1_a", "lokr_w1", "diff", "scalar"])
def test_what_is_no_low_rank_product_is_refused_by_name(tmp_path, folder, extra):
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors[f"lycoris_model_layers_0_mlp_down_proj.{extra}"] = torch.zeros(2)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UnreadableError, match=f"cannot convert 'lycoris_model_layers_0_mlp_down_proj.{extra}'"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", "peft")


def test_weights_of_a_text_encoder_as_well(tmp_path, folder, base):
    convert(folder, tmp_path / "a.safetensors", "onetrainer")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors.update({key.replace("lora_unet", "lora_te1"): t.clone() for key, t in tensors.items()})
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UnreadableError, match=r"more than one model \(lora_te1, lora_unet\)"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", "peft", base=base)


def test_flattened_names_need_the_base(tmp_path, folder, base):
    convert(folder, tmp_path / "a.safetensors", "lycoris")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    with pytest.raises(UnreadableError, match="name the base with --base"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", "peft")
    convert(tmp_path / "b.safetensors", tmp_path / "out", "peft", base=base)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder))


@pytest.mark.parametrize("name", ["nothing", "peft "])
def test_no_such_format(tmp_path, folder, name):
    with pytest.raises(UnreadableError, match="expected one of peft, nvlabs"):
        convert(folder, tmp_path / "out", name)
    with pytest.raises(UnreadableError, match="expected one of peft, nvlabs"):
        convert(folder, tmp_path / "out", "mlx", source_format=name)
