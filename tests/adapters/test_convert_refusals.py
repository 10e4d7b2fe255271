"""What `convert` refuses or says, because the result would give other outputs, or replace what is no adapter."""

import json
import os

import pytest
import torch
from format_fixtures import llama, logits, saved
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dora_peft import DoraConfig
from dora_peft.adapters import FORMATS, UnreadableError, convert, doctor, info
from dora_peft.adapters.formats.torchtune import interleaved

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "adapter", target_modules=TARGETS)


def edited(folder, change):
    """Change the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    # copies: older safetensors maps the file
    save_file(change({key: t.clone() for key, t in load_file(path).items()}), path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("config", [LoraConfig, DoraConfig])
def test_initialisations_that_change_the_base(tmp_path, init, config):
    model = get_peft_model(llama(), config(r=4, target_modules=TARGETS, init_lora_weights=init))
    model.save_pretrained(tmp_path / "adapter")
    for to in ("dora",) if config is LoraConfig else ("lycoris", "nvlabs", "mlx", "trtllm"):
        with pytest.raises(UnreadableError, match=f"initialised by '{init}', which changes the base's weights"):
            convert(tmp_path / "adapter", tmp_path / "out", to, base=llama())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_doctor_does_not_call_their_base_another_one(tmp_path, init):
    model = get_peft_model(llama(), DoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init))
    model.save_pretrained(tmp_path / "adapter")
    (finding,) = doctor(tmp_path / "adapter", llama())
    assert finding.name == "changes-base"
    assert init in finding.found


def test_what_torchtune_exports_is_told_from_plain_folders(tmp_path):
    """Where a base is given, whose norms have to be unlike."""
    base = llama()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight.mul_(torch.linspace(0.5, 2, 24)[:, None])
    folder = saved(tmp_path / "adapter", base, target_modules=TARGETS)
    base = llama()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight.mul_(torch.linspace(0.5, 2, 24)[:, None])
    convert(folder, tmp_path / "plain", "lycoris", base=base)

    def turned(tensors):
        return {
            key: interleaved(t, 2, to_torchtune=True).contiguous() if "q_proj.lora_magnitude" in key else t
            for key, t in tensors.items()
        }

    edited(folder, turned)
    with pytest.raises(UnreadableError, match=r"in torchtune's order of rows only.*--from torchtune"):
        convert(folder, tmp_path / "out", "lycoris", base=base)
    convert(folder, tmp_path / "out", "lycoris", base=base, source_format="torchtune")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_other_methods_and_biases_of_factors(tmp_path):
    model = get_peft_model(llama(), AdaLoraConfig(init_r=8, total_step=10, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "ada")
    with pytest.raises(UnreadableError, match="peft_type 'ADALORA'"):
        convert(tmp_path / "ada", tmp_path / "out", "dora", base=llama())
    get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "adapter_config.json").read_text())
    (tmp_path / "biased" / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    with pytest.raises(UnreadableError, match="has lora_bias"):
        convert(tmp_path / "biased", tmp_path / "out", "dora", base=llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_lora_over_rows_of_zeros_becomes_a_dora_without_nan(tmp_path, dtype):
    def base():
        model = llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[3:5] = 0
        return model

    model = get_peft_model(base(), LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[3:5] = 0
    model.save_pretrained(tmp_path / "lora")
    edited(tmp_path / "lora", lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    done = convert(tmp_path / "lora", tmp_path / "dora", "dora", base=base())
    assert done.notes == [
        "model.layers.0.self_attn.q_proj: 2 rows of zeros got a tiny entry in B, which plain PEFT needs"
    ]
    # in fp16 the entry is large enough to be seen
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits(tmp_path / "dora", base()), logits(tmp_path / "lora", base()), **close)
    assert "zero-rows" not in [finding.name for finding in doctor(tmp_path / "dora", base())]


def test_rows_of_zeros_that_no_entry_mends(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    get_peft_model(model, LoraConfig(r=3, target_modules=TARGETS)).save_pretrained(tmp_path / "lora")
    edited(tmp_path / "lora", lambda tensors: {k: 0 * t if "q_proj.lora_A" in k else t for k, t in tensors.items()})
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    with pytest.raises(UnreadableError, match=r"q_proj' has 1 rows of zeros in its base.*no entry of B mends them"):
        convert(tmp_path / "lora", tmp_path / "dora", "dora", base=base)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("to", ["peft", "lycoris"])
def test_what_is_not_finite(folder, tmp_path, value, to):
    def spoil(tensors):
        next(iter(tensors.values())).view(-1)[1] = value
        return tensors

    edited(folder, spoil)
    with pytest.raises(UnreadableError, match=r"holds NaN or infinite values in '.*down_proj\.lora_A"):
        convert(folder, tmp_path / "out", to)


@pytest.mark.parametrize("to", [name for name in FORMATS if name not in ("torchtune", "trtllm", "comfyui-2026")])
def test_what_overflows_the_dtype(folder, tmp_path, to):
    edited(folder, lambda tensors: {key: 1e9 * t if "lora_B" in key else t for key, t in tensors.items()})
    with pytest.raises(UnreadableError, match=f"written as {to} holds NaN or infinite values.*--dtype fp32 or bf16"):
        convert(folder, tmp_path / "out", to, dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    convert(folder, tmp_path / "out", to, dtype=torch.bfloat16)


@pytest.mark.parametrize("axis", ["bogus", "0", ""])
def test_no_such_axis(folder, tmp_path, axis):
    convert(folder, tmp_path / "there", "lycoris")
    with pytest.raises(UnreadableError, match="--axis: expected one of output, input"):
        convert(tmp_path / "there", tmp_path / "out", "peft", axis=axis, refit=True, base=llama())


class TestWhatMayBeReplaced:
    """By --force: an adapter, and nothing else. A dry run says the same."""

    @pytest.fixture(params=[False, True], ids=["for real", "dry"])
    def dry_run(self, request):
        return request.param

    def refuses(self, folder, target, dry_run, match, kind=FileExistsError, to="mlx"):
        before = {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}
        with pytest.raises(kind, match=match):
            convert(folder, target, to, force=True, dry_run=dry_run)
        assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before

    def test_the_base(self, folder, tmp_path, dry_run):
        llama().save_pretrained(tmp_path / "base")
        self.refuses(folder, tmp_path / "base", dry_run, "holds 'config.json', which is no part of one")

    def test_a_folder_above_the_adapter(self, folder, tmp_path, dry_run):
        (tmp_path / "precious.txt").write_text("x")
        self.refuses(folder, tmp_path, dry_run, "holds 'adapter', which is no part of one")

    def test_a_link(self, folder, tmp_path, dry_run):
        (tmp_path / "link").symlink_to(folder)
        self.refuses(folder, tmp_path / "link", dry_run, "is none: --force replaces an adapter alone")

    def test_what_is_no_file(self, folder, tmp_path, dry_run):
        os.mkfifo(tmp_path / "pipe")
        self.refuses(folder, tmp_path / "pipe", dry_run, "is none")

    def test_below_a_file(self, folder, tmp_path, dry_run):
        (tmp_path / "file").write_text("x")
        self.refuses(folder, tmp_path / "file" / "out", dry_run, "is no folder", ValueError)

    def test_one_file_for_two(self, folder, tmp_path, dry_run):
        self.refuses(folder, tmp_path / "o.safetensors", dry_run, "is one file, and", ValueError)

    def test_what_is_there_without_force(self, folder, dry_run):
        with pytest.raises(FileExistsError, match="--force"):
            convert(folder, folder, "mlx", dry_run=dry_run)

    def test_the_adapter_itself(self, folder):
        expected = logits(folder)
        convert(folder, folder, "nvlabs", force=True)
        convert(folder, folder, "peft", force=True)
        assert torch.equal(logits(folder), expected)


def test_a_model_of_rows_of_zeros_has_no_change(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    folder = saved(tmp_path / "adapter", model, target_modules=["q_proj"])
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.zero_()
    assert info(folder, base=base).modules[0].change is None


def test_texts_of_a_file_are_printed_on_one_line(folder, tmp_path):
    from dora_peft.cli.info import lines

    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "a\x1b[31m\nformat    mlx"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    said = lines(info(folder))
    assert all(line.isprintable() for line in said)
