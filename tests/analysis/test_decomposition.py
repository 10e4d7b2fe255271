"""The measurement against dense float64 formulas: of weights, of live models, and of folders."""

import copy
import json
import math

import pytest
import torch
from analysis_fixtures import assert_equal, config, dense, llama, nudged, trained, truth
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dora_peft
from common.memory import tensors_in
from dora_peft import DoraConfig
from dora_peft.analysis import decomposition
from dora_peft.analysis.decomposition import Change, compare_low_rank, compare_weights, decompose, decompose_folder
from dora_peft.bases.base import Opaque, base_weight

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


def factors(out=48, inner=40, r=3, dtype=torch.float32):
    return torch.randn(r, inner, dtype=dtype), torch.randn(out, r, dtype=dtype)


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_changes_of_any_size_equal_the_dense_truth(size, dtype):
    weight0 = torch.randn(48, 40).to(dtype)
    A, B = factors()
    scaling = size / 10
    weight = weight0.double() + scaling * B.double() @ A.double()
    # below 1e-6 the truth itself loses digits: W0 + D rounds D
    rel = max(1e-9, 1e-14 / size)
    expected = truth(weight0, weight)
    assert tuple(compare_low_rank(weight0, A, B, scaling)) == pytest.approx(expected, rel=rel)
    if dtype == torch.float64:
        assert tuple(compare_weights(weight0, weight)) == pytest.approx(expected, rel=rel)
    m = weight0.double().norm(dim=1) * (1 + size * torch.rand(48))
    assert tuple(compare_low_rank(weight0, A, B, scaling, m)) == pytest.approx(truth(weight0, weight, m), rel=rel)


def test_the_naive_formula_fails_where_ours_does_not():
    weight0 = torch.randn(48, 40, dtype=torch.float64)
    A, B = factors()
    weight = weight0 + 1e-9 * B.double() @ A.double()
    naive = (1 - nn.functional.cosine_similarity(weight0, weight, dim=1)).mean().item()
    expected = truth(weight0, weight)[1]
    assert abs(naive / expected - 1) > 0.5
    assert compare_low_rank(weight0, A, B, 1e-9).direction == pytest.approx(expected, rel=1e-5)


def test_opposite_and_orthogonal_rows():
    weight0 = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    weight = torch.tensor([[-3.0, 0.0], [0.0, 1.0], [-1.0, -1e-3], [2.0, 0.0]])
    change = compare_weights(weight0, weight)
    assert tuple(change) == pytest.approx(truth(weight0, weight), rel=1e-12)
    assert change.direction == pytest.approx((2 + 1 + (2 - 5e-7) + 0) / 4, rel=1e-9)
    assert compare_weights(weight0[:1], weight[:1]) == Change(2.0, 2.0)


def test_a_scaled_weight_changes_in_magnitude_alone():
    weight0 = torch.randn(8, 6, dtype=torch.float64)
    change = compare_weights(weight0, 1.5 * weight0)
    assert change.magnitude == pytest.approx(0.5 * weight0.norm(dim=1).mean().item())
    assert change.direction < 1e-15
    assert compare_weights(weight0, weight0) == Change(0.0, 0.0)


def test_rows_of_zeros_count_for_the_magnitude_and_not_for_the_direction():
    weight0, (A, B) = torch.randn(48, 40), factors()
    weight0[3] = 0
    B[3] = torch.tensor([1.0, 2.0, 3.0])
    B[5] = 0
    weight = weight0.double() + 0.5 * B.double() @ A.double()
    assert tuple(compare_low_rank(weight0, A, B, 0.5)) == pytest.approx(truth(weight0, weight), rel=1e-9)
    erased = weight0.clone()
    erased[7] = 0  # the trained row has no direction either
    assert tuple(compare_weights(weight0, erased)) == pytest.approx((weight0[7].norm().item() / 48, 0), abs=1e-8)
    # nor has W0 + s B A where it is 0 up to rounding
    A, B = factors(dtype=torch.float64)
    weight0 = -0.1 * B @ A
    change = compare_low_rank(weight0, A, B, 0.1)
    assert tuple(change) == pytest.approx((weight0.norm(dim=1).mean().item(), 0.0), abs=0, rel=1e-9)
    nothing = compare_weights(torch.zeros(4, 3), torch.zeros(4, 3))
    assert nothing == Change(0.0, 0.0)


def test_a_diverged_module_does_not_look_unchanged():
    change = compare_weights(torch.ones(3, 2), torch.full((3, 2), math.nan))
    assert math.isnan(change.magnitude)
    assert math.isnan(change.direction)


def test_several_blocks_of_rows(monkeypatch):
    weight0, (A, B) = torch.randn(48, 40), factors()
    weight = weight0 + 0.3 * torch.randn(48, 40)
    whole = compare_weights(weight0, weight), compare_low_rank(weight0, A, B, 0.3)
    monkeypatch.setattr(decomposition, "BLOCK_BYTES", 7 * 40 * 8)  # 48 = 6 * 7 + 6
    assert tuple(compare_weights(weight0, weight)) == pytest.approx(whole[0], rel=1e-13)
    assert tuple(compare_low_rank(weight0, A, B, 0.3)) == pytest.approx(whole[1], rel=1e-13)


def test_a_base_that_is_only_a_linear_map():
    layer, (A, B) = nn.Linear(40, 48), factors()
    expected = compare_low_rank(layer.weight, A, B, 0.1)
    found = compare_low_rank(Opaque(layer, 48, 40), A, B, 0.1)
    assert tuple(found) == pytest.approx(expected, rel=1e-4)


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operator creates."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in tensors_in(result)):
            if storage.data_ptr() not in old:
                self.largest = max(self.largest, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_changes_build_no_matrix_of_the_weights_size(dtype, monkeypatch):
    out, inner = 512, 384
    monkeypatch.setattr(decomposition, "BLOCK_BYTES", 16 * inner * 8)
    weight0, (A, B) = torch.randn(out, inner).to(dtype), factors(out, inner)
    with Largest() as low_rank:
        change = compare_low_rank(weight0, A, B, 0.1, torch.ones(out))
    assert low_rank.largest == 16 * inner * 8
    weight = weight0 + 1
    with Largest() as full:
        compare_weights(weight0, weight)
    assert full.largest == 16 * inner * 8
    weight = weight0.double() + 0.1 * B.double() @ A.double()
    assert tuple(change) == pytest.approx(truth(weight0, weight, torch.ones(out)), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 3), torch.ones(2, 5), torch.ones(4, 2), 1.0), r"A \[r, 3\].*found A \[2, 5\]"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(3, 2), 1.0), r"B \[4, r\].*B \[3, 2\]"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.ones(3)), "4 elements.*found 3"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_low_rank(*arguments)
    with pytest.raises(ValueError, match=r"\(4, 3\).*found \(3, 4\)"):
        compare_weights(torch.ones(4, 3), torch.ones(3, 4))


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
    assert_equal(decompose(model.base_model), expected)  # LoraModel and DoraModel
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
    for kind, tolerance in (("lora", 0.0), ("dora", 1e-6)):  # m is stored in fp32
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
    assert decompose(model) == before  # ours keeps W0
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
            parameter.data += 1  # which no version counter sees
    assert_equal(decompose(model), dense(model))


@pytest.mark.cached_norms
def test_magnitudes_of_zero_rows_are_those_after_the_step(tmp_path):
    base = llama()
    base.model.layers[0].self_attn.q_proj.weight.data[2] = 0
    model = get_peft_model(base, config("dora", init_lora_weights=True))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_B" in n], lr=1.0)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()  # leaves the refresh, which writes m of a tied row, to the next forward pass
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
        assert tuple(found["embed"]) == pytest.approx(expected, rel=1e-5)  # m starts as fp32's v
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
    weight0 = gpt.transformer.h[0].attn.c_attn.weight  # [in, out]
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
    A, B = factors(48, 64)
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
