"""`doctor` on other tools' formats."""

import json

import pytest
from format_fixtures import llama, saved, shaken
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dora_peft.adapters import convert, doctor

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
FACTOR_FORMATS = ["lycoris", "mlx", "ai-toolkit", "torchtune"]


def edited(folder, change):
    """The file of tensors in a folder, changed."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)
    return folder


def configured(folder, **entries):
    """The config in a folder, with other entries."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def found(adapter, base=None, **options):
    return {finding.name: finding for finding in doctor(adapter, llama() if base is None else base, **options)}


@pytest.mark.parametrize("name", FACTOR_FORMATS)
@pytest.mark.parametrize("some", [True, False])
def test_magnitudes_missing_in_other_formats(tmp_path, name, some):
    convert(saved(tmp_path / "a", target_modules=TARGETS), tmp_path / "out", name, base=llama())

    def drop(tensors):
        ends = (".m", ".magnitude", ".dora_scale")
        keys = [key for key in tensors if key.endswith(ends) and ("q_proj" in key or not some)]
        return {key: tensor for key, tensor in tensors.items() if key not in (keys[:1] if some else keys)}

    findings = found(edited(tmp_path / "out", drop), source_format=name)
    if some:
        assert list(findings) == ["magnitudes-missing"]
        assert findings["magnitudes-missing"].modules == ("model.layers.0.self_attn.q_proj",)
    else:
        # only mlx's config says what it was
        assert list(findings) == ["magnitudes-missing" if name == "mlx" else "plain-lora"]
        assert len(next(iter(findings.values())).modules) == 8


def test_a_plain_lora(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    shaken(model).save_pretrained(tmp_path / "lora")
    finding = found(tmp_path / "lora")["plain-lora"]
    assert finding.found == "No module has a magnitude: this is a plain LoRA."
    assert "--to dora" in finding.mend
    convert(tmp_path / "lora", tmp_path / "dora", "dora", base=llama())
    assert "plain-lora" not in found(tmp_path / "dora")


@pytest.fixture
def mlx(tmp_path):
    convert(saved(tmp_path / "a", target_modules=TARGETS), tmp_path / "mlx", "mlx")
    return tmp_path / "mlx"


def test_mlx_that_is_not_called_dora(mlx):
    assert found(mlx) == {}
    finding = found(configured(mlx, fine_tune_type="lora"))["not-called-dora"]
    assert len(finding.modules) == 8
    assert "fine_tune_type" in finding.mend


def test_mlx_of_another_rank(mlx):
    finding = found(configured(mlx, lora_parameters={"rank": 5, "scale": 3.0}))["other-ranks"]
    assert len(finding.modules) == 8


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_mlx_of_no_finite_scale(mlx, scale):
    assert "lora_parameters" in found(configured(mlx, lora_parameters={"rank": 4, "scale": scale}))["not-finite"].found
