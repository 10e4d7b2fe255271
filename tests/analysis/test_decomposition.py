"""The changes of live models and of folders against dense float64 formulas."""

import copy
import json

import pytest
import torch
from analysis_fixtures import assert_equal, config, dense, llama, nudged, trained, truth
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dora_peft
from dora_peft import DoraConfig
from dora_peft.analysis import compare_low_rank, decompose, decompose_folder
from dora_peft.bases import base_weight

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_live_and_saved_adapters_equal_the_dense_truth(kind, rslora, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 7}}
    model = trained(kind, use_rslora=rslora, **patterns)
    expected = dense(model)
    assert len(expected) == 6
    assert "model.layers.1.self_attn.v_proj" in expected
    found = decompose(model)
    assert_equal(found, expected)
    # LoraModel and DoraModel
    assert_equal(decompose(model.base_model), expected)
    model.save_pretrained(tmp_path)
    assert_equal(decompose_folder(llama(), tmp_path), found, rel=1e-12)
    only = decompose_folder(llama(), tmp_path, target=r"layers\.0.*v_proj")
    assert only == {"model.layers.0.self_attn.v_proj": found["model.layers.0.self_attn.v_proj"]}


@pytest.mark.parametrize("key", ["weight", "peft"])
def test_both_spellings_of_the_magnitude(key, tmp_path):
    model = trained("dora", magnitude_key=key)
    model.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "magnitude" in name]
    assert names
    assert all(name.endswith("lora_magnitude_vector.weight") == (key == "weight") for name in names)
    assert_equal(decompose_folder(llama(), tmp_path), decompose(model), rel=1e-12)


def test_magnitude_only_modules_turn_nothing(tmp_path):
    model = trained("dora", magnitude_only_modules=["o_proj"])
    found = decompose(model)
    assert [name for name, change in found.items() if change.direction == 0] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    assert all(change.magnitude > 0 for change in found.values())
    model.save_pretrained(tmp_path)
    assert_equal(decompose_folder(llama(), tmp_path), found, rel=1e-12)


def test_a_new_adapter_has_changed_nothing():
    for kind, tolerance in (("lora", 0.0), ("dora", 1e-6)):
        # m is stored in fp32
        for change in decompose(get_peft_model(llama(), config(kind, init_lora_weights=True))).values():
            assert change.direction == 0
            assert change.magnitude <= tolerance


def test_the_named_adapter_alone_whichever_is_active():
    model = trained("dora")
    model.add_adapter("other", config("dora", r=3))
    assert_equal(decompose(model, adapter="other"), dense(model, "other"))
    assert_equal(decompose(model), dense(model))
    model.set_adapter("other")
    assert_equal(decompose(model), dense(model))
    with pytest.raises(ValueError, match=r"named 'third', found \['default', 'other'\]"):
        decompose(model, adapter="third")
    with pytest.raises(ValueError, match="fully fine-tuned"):
        decompose(model, reference=llama())


def test_merged_adapters():
    model = trained("dora")
    before = decompose(model)
    model.merge_adapter()
    # ours keeps W0
    assert decompose(model) == before
    model = trained("lora")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj': .*unmerge_adapter"):
        decompose(model)


@pytest.mark.cached_norms
def test_a_stale_norm_does_not_matter():
    model = trained("dora")
    model(torch.arange(4)[None])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # which no version counter sees
            parameter.data += 1
    assert_equal(decompose(model), dense(model))


@pytest.mark.cached_norms
def test_magnitudes_of_zero_rows_are_those_after_the_step(tmp_path):
    base = llama()
    base.model.layers[0].self_attn.q_proj.weight.data[2] = 0
    model = get_peft_model(base, config("dora", init_lora_weights=True))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_B" in n], lr=1.0)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    # leaves the refresh, which writes m of a tied row, to the next forward pass
    optimizer.step()
    found = decompose(model)["model.layers.0.self_attn.q_proj"]
    module = base.model.layers[0].self_attn.q_proj
    row = module.scaling["default"] * module.lora_B["default"].weight[2] @ module.lora_A["default"].weight
    assert row.norm() > 1e-4
    dora_peft.refresh(model)
    assert module.magnitude("default")[2].item() == pytest.approx(row.norm().item(), rel=1e-5)
    assert_equal({"m": found}, {"m": dense(model)["model.layers.0.self_attn.q_proj"]})
    model.save_pretrained(tmp_path)
    fresh = llama()
    fresh.model.layers[0].self_attn.q_proj.weight.data[2] = 0
    assert_equal(decompose_folder(fresh, tmp_path), decompose(model), rel=1e-6)


def test_embeddings_convolutions_and_transposed_layers(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(20, 6), nn.Conv2d(4, 6, 3)

    def build(make):
        torch.manual_seed(0)
        model = get_peft_model(Mixed(), make(r=2, target_modules=["embed", "conv"], init_lora_weights=False))
        return model

    for make in (DoraConfig, LoraConfig):
        model = build(make)
        found, base = decompose(model), model.get_base_model()
        A, B = base.embed.lora_embedding_A["default"], base.embed.lora_embedding_B["default"]
        weight0 = base.embed.base_layer.weight.T.double()
        weight = weight0 + base.embed.scaling["default"] * B.double() @ A.double()
        expected = truth(weight0, weight)
        # m starts as fp32's v
        assert tuple(found["embed"]) == pytest.approx(expected, rel=1e-5)
        A, B = base.conv.lora_A["default"].weight.double(), base.conv.lora_B["default"].weight.double()
        weight0 = base.conv.base_layer.weight.double().flatten(1)
        weight = weight0 + base.conv.scaling["default"] * B.flatten(1) @ A.flatten(1)
        assert tuple(found["conv"]) == pytest.approx(truth(weight0, weight), rel=1e-5)
        model.save_pretrained(tmp_path / make.__name__)
        torch.manual_seed(0)
        assert_equal(decompose_folder(Mixed(), tmp_path / make.__name__), found, rel=1e-12)

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    reference = copy.deepcopy(gpt)
    # [in, out]
    weight0 = gpt.transformer.h[0].attn.c_attn.weight
    weight0.data += 0.1 * torch.randn_like(weight0)
    found = decompose(gpt, reference=reference)
    old = reference.transformer.h[0].attn.c_attn.weight
    assert tuple(found["transformer.h.0.attn.c_attn"]) == pytest.approx(truth(old.T, weight0.T), rel=1e-9)
    assert "lm_head" not in found


@pytest.mark.parametrize("shard", ["1GB", "6KB"])
def test_full_fine_tuning_live_and_saved(shard, tmp_path):
    base, model = llama(), nudged(llama())
    weights = {name: module.weight for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    del weights["lm_head"]
    expected = {name: truth(weights[name], model.get_submodule(name).weight) for name in weights}
    assert len(expected) == 14
    for reference in (base, weights, lambda name: base.get_parameter(f"{name}.weight")):
        assert_equal(decompose(model, reference=reference), expected)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "6KB")
    assert_equal(decompose_folder(base, tmp_path), expected)
    assert list(decompose_folder(base, tmp_path, target=r"1\..*q_proj")) == ["model.layers.1.self_attn.q_proj"]


def test_a_quantised_base(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(torch.randn(48, 64), requires_grad=False, quant_type="nf4").to("cpu")
    A, B = torch.randn(3, 64), torch.randn(48, 3)
    seam = base_weight(layer, "layer")
    expected = truth(seam.dense(), seam.dense().double() + 0.1 * B.double() @ A.double())
    assert tuple(compare_low_rank(seam, A, B, 0.1)) == pytest.approx(expected, rel=1e-9)


def test_errors_of_live_models():
    with pytest.raises(ValueError, match="expected `reference`"):
        decompose(llama())
    with pytest.raises(ValueError, match=r"path matches 'banana', found \['model.layers.0"):
        decompose(trained("lora"), target="banana")
    with pytest.raises(ValueError, match=r"module 'model.layers.0.self_attn.q_proj' in `reference`, found none"):
        decompose(llama(), reference={})
    with pytest.raises(ValueError, match=r"q_proj': expected a weight of shape \(3, 4\)"):
        decompose(llama(), reference=lambda name: torch.ones(3, 4))


def test_errors_of_folders(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: expected model.safetensors, found no such folder"):
        decompose_folder(llama(), tmp_path / "nowhere")
    folder = tmp_path / "adapter"
    trained("dora").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"modules of LlamaForCausalLM, found .*'model.layers.1.self_attn.q_proj'"):
        decompose_folder(llama(layers=1), folder)
    with pytest.raises(ValueError, match="expected modules of LlamaModel"):
        decompose_folder(llama().model, folder)
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2, vocab_size=8,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match=r"q_proj': expected A \[r, 32\].*found A \[2, 16\]"):
        decompose_folder(wide, folder)

    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 9}))
    with pytest.raises(ValueError, match="expected rank 9 in module"):
        decompose_folder(llama(), folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="LORA or DORA, found IA3"):
        decompose_folder(llama(), folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "magnitude" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_magnitude_vector for module"):
        decompose_folder(llama(), folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter: .*header"):
        decompose_folder(llama(), folder)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"adapter: expected adapter_model.safetensors, found .*\.bin.*only safetensors"
    ):
        decompose_folder(llama(), folder)

    nudged(llama()).model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.q_proj.weight' for LlamaForCausalLM"):
        decompose_folder(llama(), tmp_path / "headless")
