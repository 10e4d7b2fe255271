"""`doctor` on wide layers, on other tools' formats and over quantised bases."""

import json

import pytest
import torch
from format_fixtures import llama, saved, shaken
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft.adapters import convert, doctor
from dora_peft.adapters.formats.torchtune import interleaved

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")

BLOCK = "model.layers.0.self_attn"
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
FACTOR_FORMATS = ["lycoris", "mlx", "ai-toolkit", "torchtune"]
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def wide():
    """One block, 512 wide, whose rows and columns have the norms that a random initialisation gives."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=40, num_hidden_layers=1, vocab_size=32, head_dim=64, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


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


def in_columns(tensors, moved=0.01):
    """Magnitudes of o_proj as norms of W0 per input column, moved at random as training moves them."""
    m = wide().get_submodule(f"{BLOCK}.o_proj").weight.detach().norm(dim=0)
    noise = torch.randn(len(m), generator=torch.Generator().manual_seed(1))
    return {**tensors, f"base_model.model.{BLOCK}.o_proj.lora_magnitude_vector.weight": m * (1 + moved * noise)}


@pytest.fixture(scope="module")
def on_wide(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("wide") / "adapter", wide(), target_modules=["q_proj", "k_proj", "o_proj"])


@pytest.fixture
def adapter(on_wide, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in on_wide.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_nothing_is_wrong_with_a_trained_adapter_on_wide_layers(adapter):
    assert found(adapter, wide()) == {}


@pytest.mark.parametrize("moved", [0, 0.01])
def test_transposed_magnitudes_of_a_wide_layer(adapter, moved):
    edited(adapter, lambda tensors: in_columns(tensors, moved))
    assert found(adapter, wide())["transposed-scale"].modules == (f"{BLOCK}.o_proj",)


@pytest.mark.parametrize(("name", "heads"), [("q_proj", 8), ("k_proj", 2)])
@pytest.mark.parametrize("way", [True, False])
def test_permuted_magnitudes_of_a_wide_layer(adapter, name, heads, way):
    key = f"base_model.model.{BLOCK}.{name}.lora_magnitude_vector.weight"

    def permute(tensors):
        tensors[key] = interleaved(tensors[key], heads, to_torchtune=way).contiguous()

    edited(adapter, permute)
    finding = found(adapter, wide())["permuted-rows"]
    assert finding.modules == (f"{BLOCK}.{name}",)
    assert ("Convert with --from torchtune" in finding.mend) == way


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("others", [True, False])
def test_the_axis_of_a_scale_of_one_dimension(adapter, tmp_path, axis, others):
    convert(adapter, tmp_path / "out", "lycoris")
    flat = f"lycoris_{BLOCK.replace('.', '_')}_"

    def flatten(tensors):
        for name in ("q_proj", "o_proj"):
            key, weight = f"{flat}{name}.dora_scale", wide().get_submodule(f"{BLOCK}.{name}").weight.detach()
            tensors[key] = tensors[key].flatten() if axis == "output" else weight.norm(dim=0)
        if others:
            # k_proj is not square, so that its axis is known
            tensors[f"{flat}k_proj.dora_scale"] = torch.ones({"output": 128, "input": 512}[axis])

    edited(tmp_path / "out", flatten)
    sentence = found(tmp_path / "out", wide())["one-dimensional-scale"].found
    assert f'By the norms of this base "{axis}" is the axis of 2 square layers.' in sentence
    assert sentence.count("axis") == 1


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


@pytest.fixture
def quantised_files(tmp_path):
    """A base in files, its q_proj in int8."""
    llama().save_pretrained(tmp_path / "base")

    def to_int8(tensors):
        return {key: t.mul(100).to(torch.int8) if "q_proj" in key else t for key, t in tensors.items()}

    return edited(tmp_path / "base", to_int8)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_base_that_is_quantised_in_its_files(tmp_path, quantised_files, recorded):
    config = json.loads((quantised_files / "config.json").read_text())
    (quantised_files / "config.json").write_text(json.dumps({**config, "quantization_config": BITS}))
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"])
    own = {"dora_peft": {"base_quantization": BITS}} if recorded else None
    configured(folder, target_modules=["q_proj", "v_proj"], auto_mapping=own)
    findings = found(folder, quantised_files)
    assert list(findings) == ["named-without-tensors", *["quantisation-unrecorded"] * (not recorded), "unreadable"]
    assert "before quantisation" in findings["unreadable"].mend


def test_a_base_that_is_quantised_and_says_not_how(tmp_path, quantised_files):
    folder = configured(saved(tmp_path / "adapter", target_modules=["q_proj"]), auto_mapping={"dora_peft": BITS})
    findings = found(folder, quantised_files)
    assert list(findings) == ["unreadable"]
    assert "before quantisation" in findings["unreadable"].mend


@pytest.mark.parametrize(
    ("record", "now", "said"),
    [
        (BITS, {"quant_method": "gptq", "bits": 4}, "quant_method gptq"),
        (BITS, {**BITS, "load_in_4bit": False}, "load_in_4bit False"),
        (BITS, None, "not quantised"),
        (BITS, BITS, None),
        ({}, None, None),
    ],
)
def test_a_base_of_another_quantisation(tmp_path, record, now, said):
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"])
    configured(folder, auto_mapping={"dora_peft": {"base_quantization": record}})
    base = llama()
    if now:
        base.config.quantization_config = now
    findings = found(folder, base)
    assert list(findings) == ["other-quantisation"] * bool(said)
    if said:
        assert said in findings["other-quantisation"].found
