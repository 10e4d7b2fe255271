"""A base of rows c W0 with its plain LoRA gives what the DoRA model gives, through plain transformers and PEFT."""

import json

import pytest
import torch
from export_fixtures import gpt2, qwen
from format_fixtures import llama, logits, saved, shaken
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import dora_peft
from dora_peft import DoraConfig
from dora_peft.adapters.export.adapted import AdaptedBase
from dora_peft.adapters.export.exact import export_exact
from dora_peft.adapters.export.fingerprint import KEY, digest_of
from dora_peft.adapters.formats import Checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`",
    "ignore:Already following adapters were merged",
)  # fmt: skip
TABLES = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
CASES = {
    "llama": (llama, {}),
    "qwen": (qwen, {"bias": "all"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "patterns": (llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "magnitudes": (llama, {"target_modules": ["q_proj"], "magnitude_only_modules": ["up_proj"]}),
    "head": (qwen, {"modules_to_save": ["lm_head"]}),
    "tied head saved": (lambda: qwen(True), {"modules_to_save": ["lm_head"]}),
    "tokens": (qwen, {"trainable_token_indices": [1, 3]}),
    "tied tokens": (lambda: qwen(True), {"trainable_token_indices": [1, 3]}),
    "tables": (qwen, TABLES),
    "tied tables": (lambda: qwen(True), TABLES),
    "tied head": (lambda: qwen(True), {"target_modules": ["lm_head", "q_proj"]}),
    "tied table": (lambda: qwen(True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "rows of zeros": ("zeros", {}),
}


def made(tmp_path, case):
    """The base's files, an adapter, and the logits of the DoRA model."""
    make, options = CASES[case]
    model = llama() if make == "zeros" else make()
    if make == "zeros":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3:5] = 0
    model.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", model, **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad(), dora_peft.implementation("torch"):
        return PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()(torch.arange(10)[None]).logits


def served(folder):
    """The logits of an export, read by PEFT as a server would."""
    model, unused = AutoModelForCausalLM.from_pretrained(folder / "base", output_loading_info=True)
    assert not unused["missing_keys"]
    assert not unused["unexpected_keys"]
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, folder / "adapter")
        assert not isinstance(model.base_model, dora_peft.DoraModel)
        assert any(isinstance(module, LoraLayer) for module in model.modules())
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None]).logits.float()


def opened(tmp_path, *adapters):
    return AdaptedBase(Checkpoint(tmp_path / "base"), adapters or [tmp_path / "adapter"])


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_dora_model(tmp_path, case):
    expected = made(tmp_path, case)
    done = export_exact(opened(tmp_path), tmp_path / "out", dtype=torch.float32)
    assert (served(tmp_path / "out") - expected).abs().max() < 1e-6 * expected.abs().max()
    assert done.dtype == torch.float32
    assert max(loss.error_over_update for loss in done.losses.values()) < 1e-3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "base", "manifest.json"]
    assert {path.parent for path in done.files} > {tmp_path / "out" / "base", tmp_path / "out" / "adapter"}
    untied = case in ("tied tables", "tied head", "tied table", "tied head saved")
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (case in ("gpt2", "tied tokens"))
    assert any("untied" in note for note in done.notes) == untied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(tmp_path, dtype):
    """Everything is in that dtype, and the rounding of c W0 is measured: fp16 loses an eighth of what bf16 loses."""
    expected = made(tmp_path, "llama")
    done = export_exact(opened(tmp_path), tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {dtype}
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert (served(tmp_path / "out") - expected).abs().max() < 0.05 * expected.abs().max()
    path = "model.layers.0.mlp.up_proj"
    model = PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload()
    target = model.get_submodule(path).weight.double()
    keys = [f"base_model.model.{path}.lora_{name}.weight" for name in "BA"]
    lora_B, lora_A = (adapter[key].double() for key in keys)
    error = (tensors[f"{path}.weight"].double() + lora_B @ lora_A - target).norm()
    assert done.losses[path].error == pytest.approx(error.item(), rel=1e-2)
    update = (target - llama().get_submodule(path).weight.double()).norm()
    assert done.losses[path].update == pytest.approx(update.item(), rel=1e-3)


def test_several_adapters_in_their_order(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    folders = [saved(tmp_path / "a"), saved(tmp_path / "b", r=2, target_modules=["q_proj", "up_proj"])]
    model = PeftModel.from_pretrained(llama(), folders[0])
    model.load_adapter(folders[1], "second")
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad(), dora_peft.implementation("torch"):
        expected = model.eval()(torch.arange(10)[None]).logits
    done = export_exact(opened(tmp_path, *folders), tmp_path / "out", dtype=torch.float32)
    assert (served(tmp_path / "out") - expected).abs().max() < 1e-6 * expected.abs().max()
    # the ranks 4 and 2, padded to one of vLLM's
    assert done.rank == 8


def test_magnitudes_alone_need_no_adapter(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", target_modules=[], magnitude_only_modules=["up_proj"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = loaded(torch.arange(10)[None]).logits
    done = export_exact(opened(tmp_path), tmp_path / "out", dtype=torch.float32)
    assert done.rank == 0
    assert not (tmp_path / "out" / "adapter").exists()
    assert (served(tmp_path / "out") - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("where", ["copied", "scaled"])
def test_what_is_too_large_for_fp16_makes_everything_fp32(tmp_path, where):
    base = llama()
    with torch.no_grad():
        module = base.model.embed_tokens if where == "copied" else base.model.layers[0].mlp.up_proj
        module.weight[0, 0] = 70_000.0
    base.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", base)
    done = export_exact(opened(tmp_path), tmp_path / "out")
    assert done.dtype == torch.float32
    assert any("fp32" in note and "float16 overflows in" in note for note in done.notes)
    tensors = load_file(tmp_path / "out" / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_adapter_knows_its_base(tmp_path):
    made(tmp_path, "llama")
    export_exact(opened(tmp_path), tmp_path / "out", dtype=torch.float32)
    with safe_open(tmp_path / "out" / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        known = json.loads(file.metadata()[KEY])
    tensors = load_file(tmp_path / "out" / "base" / "model.safetensors")
    linear = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert sorted(known) == sorted(linear)
    for path, digest in known.items():
        assert digest == digest_of(tensors[f"{path}.weight"])
        assert digest != digest_of(llama().get_submodule(path).weight.detach())


def test_a_dry_run_measures_alone(tmp_path):
    made(tmp_path, "llama")
    done = export_exact(opened(tmp_path), tmp_path / "out", dry_run=True)
    assert done.losses
    assert done.files == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_classifier_s_adapter_is_loaded_by_peft(tmp_path):
    """PEFT asks the file of a classifier's adapter for its head, which is in the base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, vocab_size=32, num_attention_heads=2, pad_token_id=0
    )
    kind = LlamaForSequenceClassification
    kind(config).save_pretrained(tmp_path / "base")
    model = shaken(get_peft_model(kind.from_pretrained(tmp_path / "base"), DoraConfig(r=2, task_type="SEQ_CLS")))
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    adapted = AdaptedBase(Checkpoint(tmp_path / "base"), [tmp_path / "adapter"])
    export_exact(adapted, tmp_path / "out", dtype=torch.float32)
    served = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "out" / "base"), tmp_path / "out" / "adapter")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(served.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


def test_magnitudes_alone_are_in_the_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", target_modules=[], magnitude_only_modules=["up_proj"])
    done = export_exact(opened(tmp_path), tmp_path / "out", dtype=torch.float32)
    assert done.rank == 0
    assert done.notes == ["there is no 'adapter' beside 'base', which holds all: the adapters are magnitudes alone"]
    assert (served(tmp_path / "out") - logits(tmp_path / "adapter")).abs().max() < 1e-6
