"""One broken adapter for each finding of `doctor`, and none for an adapter that is well."""

import json

import pytest
import torch
from format_fixtures import llama, saved, shaken
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from dora_peft import DoraConfig
from dora_peft.adapters import convert, doctor, doctor_patterns
from dora_peft.adapters.formats.torchtune import interleaved

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"


class Broken:
    """A saved adapter whose tensors and config can be edited."""

    def __init__(self, folder):
        self.folder = saved(folder, target_modules=TARGETS)
        # copies: older safetensors maps the file, which `findings` writes to
        self.tensors = {key: t.clone() for key, t in load_file(folder / "adapter_model.safetensors").items()}
        self.config = json.loads((folder / "adapter_config.json").read_text())

    def key(self, part, path=Q):
        return next(key for key in self.tensors if f".{path}.{part}" in key)

    def magnitudes(self, change):
        for key in [key for key in self.tensors if "magnitude" in key]:
            path = key.removeprefix("base_model.model.").split(".lora_")[0]
            weight = dict(llama().named_modules())[path].weight.detach()
            factors = (self.tensors[self.key(part, path)] for part in ("lora_A", "lora_B"))
            self.tensors[key] = change(path, self.tensors[key], weight, *factors).contiguous()

    def findings(self, base=None):
        save_file(self.tensors, self.folder / "adapter_model.safetensors")
        (self.folder / "adapter_config.json").write_text(json.dumps(self.config))
        return {finding.name: finding for finding in doctor(self.folder, llama() if base is None else base)}


@pytest.fixture
def broken(tmp_path):
    return Broken(tmp_path / "adapter")


def norms(weight):
    return torch.linalg.vector_norm(weight, dim=1)


def test_nothing_is_wrong(broken, tmp_path):
    assert broken.findings() == {}
    llama().save_pretrained(tmp_path / "base")
    assert broken.findings(tmp_path / "base") == {}


def test_magnitudes_missing(broken):
    del broken.tensors[broken.key("lora_magnitude_vector")]
    assert broken.findings()["magnitudes-missing"].modules == (Q,)


def test_all_magnitudes_missing(broken):
    broken.tensors = {key: t for key, t in broken.tensors.items() if "magnitude" not in key}
    assert len(broken.findings()["magnitudes-missing"].modules) == 8


def test_magnitudes_without_use_dora(broken):
    broken.config["use_dora"] = False
    assert "not-called-dora" in broken.findings()


def test_magnitudes_never_moved(broken):
    broken.magnitudes(lambda path, m, weight, A, B: norms(weight))
    found = broken.findings()["magnitudes-never-moved"]
    assert len(found.modules) == 8
    assert "B was trained" in found.found


def test_magnitudes_never_moved_in_bf16(broken):
    broken.magnitudes(lambda path, m, weight, A, B: norms(weight).bfloat16())
    assert {"magnitudes-never-moved", "low-precision-magnitudes"} <= broken.findings().keys()


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_some_magnitudes_never_moved(broken, held):
    # in the norms of a base in bf16, PEFT keeps fp32 numbers that bf16 holds
    broken.magnitudes(lambda path, m, weight, A, B: norms(weight).to(held).float() if path == Q else m)
    assert broken.findings()["magnitudes-never-moved"].modules == (Q,)


def test_magnitudes_of_modules_that_did_not_train(broken):
    broken.tensors[broken.key("lora_B")].zero_()
    broken.magnitudes(lambda path, m, weight, A, B: norms(weight) if path == Q else m)
    assert broken.findings() == {}


def test_an_adapter_before_training(tmp_path):
    get_peft_model(llama(), DoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "adapter")
    assert [finding.name for finding in doctor(tmp_path / "adapter", llama())] == ["untrained"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_magnitudes_in_low_precision(broken, dtype):
    broken.magnitudes(lambda path, m, weight, A, B: m.to(dtype))
    assert str(dtype).split(".")[1] in broken.findings()["low-precision-magnitudes"].found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_not_finite(broken, part, value):
    broken.tensors[broken.key(part)].view(-1)[1] = value
    assert broken.findings()["not-finite"].modules == (broken.key(part),)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("entry", ["lora_alpha", "alpha_pattern"])
def test_numbers_of_the_config_that_are_not_finite(broken, entry, value):
    broken.config[entry] = {"q_proj": value} if "pattern" in entry else value
    assert entry in broken.findings()["not-finite"].found


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64])
def test_tensors_of_unusual_dtypes(broken, part, dtype):
    key = broken.key(part)
    broken.tensors[key] = broken.tensors[key].to(dtype)
    findings = broken.findings()
    assert ("low-precision-magnitudes" in findings) == (part == "lora_magnitude_vector")


def test_not_finite_in_fp8(broken):
    key = broken.key("lora_B")
    broken.tensors[key] = torch.full_like(broken.tensors[key], torch.nan).to(torch.float8_e4m3fn)
    assert broken.findings()["not-finite"].modules == (key,)


def test_zero_rows(broken):
    base = llama()
    with torch.no_grad():
        base.get_submodule(Q).weight[3] = 0
    broken.tensors[broken.key("lora_B")][3] = 0
    found = broken.findings(base)
    assert found["zero-rows"].modules == (Q,)


def test_other_ranks(broken):
    broken.config["r"] = 5
    assert len(broken.findings()["other-ranks"].modules) == 8
    broken.config["rank_pattern"] = {"q_proj": 4}
    assert len(broken.findings()["other-ranks"].modules) == 6


def test_tensors_that_the_config_does_not_name(broken):
    broken.config["target_modules"] = ["k_proj", "o_proj", "down_proj"]
    assert Q in broken.findings()["not-named"].modules


def test_modules_that_the_config_names_without_tensors(broken):
    broken.config["target_modules"] = [*TARGETS, "v_proj"]
    assert len(broken.findings()["named-without-tensors"].modules) == 2
    broken.config["target_modules"] = r".*\.(q|k|o|down|v)_proj"
    assert len(broken.findings()["named-without-tensors"].modules) == 2


def test_modules_that_are_saved_whole(broken):
    broken.config["target_modules"] = [*TARGETS, "lm_head"]
    assert broken.findings()["named-without-tensors"].modules == ("lm_head",)
    broken.config["modules_to_save"] = ["lm_head"]
    assert broken.findings() == {}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_count(tmp_path):
    folder = saved(tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    broken, embedding = Broken.__new__(Broken), "model.embed_tokens"
    broken.folder, broken.tensors = folder, load_file(folder / "adapter_model.safetensors")
    broken.config = json.loads((folder / "adapter_config.json").read_text())
    assert broken.findings() == {}
    broken.config["rank_pattern"] = {"embed_tokens": 5}
    assert broken.findings()["other-ranks"].modules == (embedding,)
    broken.config["rank_pattern"] = {}
    broken.config["target_modules"] = ["q_proj"]
    assert broken.findings()["not-named"].modules == (embedding,)
    del broken.tensors[broken.key("lora_magnitude_vector", embedding)]
    assert broken.findings()["magnitudes-missing"].modules == (embedding,)


@pytest.mark.parametrize("value", ["no", "yes", 1, []])
def test_use_dora_that_is_no_boolean(broken, value):
    broken.config["use_dora"] = value
    assert repr(str(value)) in broken.findings()["unclear-use-dora"].found


@pytest.mark.parametrize("targets", ["(", "*", "[", 3, {"q_proj": 1}, ["q_proj", 3], True])
def test_target_modules_that_cannot_be_used(broken, targets):
    broken.config["target_modules"] = targets
    found = broken.findings()["unreadable"].found
    assert "target_modules" in found
    assert "\n" not in found


@pytest.mark.parametrize("entry", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_cannot_be_used(broken, entry):
    broken.config[entry] = {"q_proj": 4, "(": 4}
    assert entry in broken.findings()["unreadable"].found


@pytest.mark.parametrize("entry", ["target_modules", "rank_pattern"])
@pytest.mark.parametrize("endless", [r"(\w+\.?)+!", r"(\w|\w\w|\w\w\w|\.)*!"])
def test_expressions_without_end(broken, entry, endless, monkeypatch):
    monkeypatch.setattr(doctor_patterns, "SECONDS", 0.5)
    broken.config[entry] = endless if entry == "target_modules" else {endless: 4}
    found = broken.findings()["unreadable"].found
    assert entry in found
    assert "does not come to an end" in found


def test_sound_expressions_with_repetitions_inside_repetitions(broken):
    broken.config["target_modules"] = r"(\w+\.)*(q|k|o|down)_proj"
    broken.config["rank_pattern"] = {r"(self_)?(attn\.)+[qk]_proj": 4}
    assert broken.findings() == {}


def test_another_base(broken):
    torch.manual_seed(5)
    base = llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.2)
    found = broken.findings(base)["another-base"]
    assert len(found.modules) == 8
    assert "2 %" in found.found


def test_a_base_with_other_shapes(broken):
    base = llama()
    base.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 3)
    assert Q in broken.findings(base)["unreadable"].found


def test_magnitudes_of_a_normaliser(broken, tmp_path):
    convert(broken.folder, tmp_path / "trtllm", "trtllm", base=llama())
    found = {finding.name: finding for finding in doctor(tmp_path / "trtllm", llama())}
    assert len(found["normalised-magnitudes"].modules) == 8
    assert doctor(tmp_path / "trtllm", llama(), source_format="trtllm") == []


def unlike():
    """A base whose rows have norms of their own each, as those of trained models."""
    base = llama()
    with torch.no_grad():
        for path, layer in base.named_modules():
            if path.endswith("_proj"):
                layer.weight.mul_(torch.linspace(0.5, 2, len(layer.weight))[:, None])
                layer.weight.mul_(torch.linspace(2, 0.7, layer.weight.shape[1])[None])
    return base


def test_rows_in_another_order(broken):
    base = unlike()
    broken.magnitudes(lambda path, m, weight, A, B: norms(base.get_submodule(path).weight.detach() + 3 * B @ A))
    key = broken.key("lora_magnitude_vector")
    broken.tensors[key] = interleaved(broken.tensors[key], 2, to_torchtune=True)
    assert broken.findings(base)["permuted-rows"].modules == (Q,)


def test_a_transposed_scale_on_a_square_layer(broken):
    base, o_proj = unlike(), "model.layers.0.self_attn.o_proj"
    broken.magnitudes(lambda path, m, weight, A, B: norms(base.get_submodule(path).weight.detach() + 3 * B @ A))
    A, B = (broken.tensors[broken.key(part, o_proj)] for part in ("lora_A", "lora_B"))
    composed = base.get_submodule(o_proj).weight.detach() + 3 * B @ A
    broken.tensors[broken.key("lora_magnitude_vector", o_proj)] = torch.linalg.vector_norm(composed, dim=0)
    assert broken.findings(base)["transposed-scale"].modules == (o_proj,)


def test_a_scale_of_one_dimension(broken, tmp_path):
    convert(broken.folder, tmp_path / "a.safetensors", "lycoris")
    tensors = load_file(tmp_path / "a.safetensors")
    flat = {key: t.flatten() if key.endswith("dora_scale") else t for key, t in tensors.items()}
    save_file(flat, tmp_path / "b.safetensors")
    found = {finding.name: finding for finding in doctor(tmp_path / "b.safetensors", llama())}
    assert list(found) == ["one-dimensional-scale"]
    assert len(found["one-dimensional-scale"].modules) == 8


def test_a_quantised_base_that_the_folder_does_not_record(broken):
    base = llama()
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "bitsandbytes" in broken.findings(base)["quantisation-unrecorded"].found
    get = get_peft_model(base, DoraConfig(r=4, target_modules=TARGETS))
    shaken(get).save_pretrained(broken.folder)
    own = json.loads((broken.folder / "adapter_config.json").read_text())["auto_mapping"]["dora_peft"]
    assert own["base_quantization"]["quant_method"] == "bitsandbytes"
    base = llama()
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert doctor(broken.folder, base) == []


def test_every_finding_says_what_to_do(broken):
    broken.config["use_dora"] = False
    (finding,) = broken.findings().values()
    assert finding.found.endswith(".")
    assert finding.mend.endswith(".")
