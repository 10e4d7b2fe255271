"""The weight-decomposition analysis against dense float64 formulas, on live models, folders, and during training."""

import copy
import io
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import dora_peft
from benchmark_common import tensors_in
from dora_peft import DoraConfig, analysis
from dora_peft.analysis import (
    Change,
    DecompositionCallback,
    compare_low_rank,
    compare_weights,
    correlate,
    decompose,
    decompose_folder,
    draw_pattern,
    draw_trajectories,
    layer_kind,
    to_history,
)
from dora_peft.base_weight import Opaque, base_weight

TARGETS = ["q_proj", "v_proj", "up_proj"]
# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")


def truth(weight0, weight, magnitude=None):
    """dM and dD in float64. 1 - cos is half the squared distance of the unit rows, which cancels nothing."""
    weight0, weight = weight0.double(), weight.double()
    w, v = weight0.norm(dim=1), weight.norm(dim=1)
    whole = (w > 0) & (v > 0)
    apart = (weight[whole] / v[whole, None] - weight0[whole] / w[whole, None]).square().sum(1) / 2
    m = v if magnitude is None else magnitude.double().flatten()
    return (m - w).abs().mean().item(), apart.mean().item()


def factors(out=48, inner=40, r=3, dtype=torch.float32):
    return torch.randn(r, inner, dtype=dtype), torch.randn(out, r, dtype=dtype)


def llama(layers=2):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "vocab_size": 32}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config)


def config(kind, **options):
    shared = {"r": 2, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    if kind == "dora":
        return DoraConfig(**(shared | options))
    return LoraConfig(**(shared | {"use_dora": kind == "peft_dora"} | options))


def trained(kind, **options):
    """An adapter with random factors, and magnitudes that are not those of its start."""
    model = get_peft_model(llama(), config(kind, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def dense(model, adapter="default"):
    """The truth of a live model's adapted modules from dense weights: W0, W0 + s B A and m."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and adapter in module.lora_A:
            A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
            weight0 = module.get_base_layer().weight.double()
            m = module.lora_magnitude_vector[adapter].weight if len(module.lora_magnitude_vector) else None
            found[name] = truth(weight0, weight0 + module.scaling[adapter] * B @ A, m)
    assert found
    return found


def assert_equal(found, expected, rel=1e-9):
    assert found.keys() == expected.keys()
    assert found
    for name in found:
        assert tuple(found[name]) == pytest.approx(tuple(expected[name]), rel=rel, abs=1e-15), name


# ---- one module


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
    monkeypatch.setattr(analysis, "BLOCK_BYTES", 7 * 40 * 8)  # 48 = 6 * 7 + 6
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
    monkeypatch.setattr(analysis, "BLOCK_BYTES", 16 * inner * 8)
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


# ---- live models and folders


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


def nudged(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


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


# ---- errors


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


# ---- training


def fit(model, folder, callback, max_steps=5, resume=None, extra=None, **options):
    rows = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
                "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}  # fmt: skip
    arguments = TrainingArguments(str(folder), max_steps=max_steps, **(defaults | options))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback, *([extra] if extra else [])])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def at(history, step):
    return {e["module"]: Change(e["magnitude"], e["direction"]) for e in history if e["step"] == step}


@pytest.mark.parametrize("kind", ["lora", "peft_dora", "dora", "full"])
@pytest.mark.cached_norms
def test_the_callback_records_what_decompose_finds(kind, tmp_path):
    base = llama()
    model = llama() if kind == "full" else get_peft_model(llama(), config(kind, init_lora_weights=True))
    path = tmp_path / "deep" / "pattern.json"
    callback = DecompositionCallback(steps=2, path=path)
    fit(model, tmp_path, callback)
    assert sorted({entry["step"] for entry in callback.history}) == [2, 4, 5]
    assert json.loads(path.read_text()) == callback.history
    assert [entry.name for entry in path.parent.iterdir()] == ["pattern.json"]
    earlier, found = at(callback.history, 2), at(callback.history, 5)
    assert_equal(found, decompose(model, reference=base if kind == "full" else None), rel=1e-12)
    if kind != "full":
        assert_equal(found, dense(model))
    # a second training begins anew, where this one ended
    second = copy.deepcopy(model)
    fit(second, tmp_path, callback, 1)
    assert sorted({entry["step"] for entry in callback.history}) == [1]
    if kind == "full":
        assert_equal(at(callback.history, 1), decompose(second, reference=model), rel=1e-12)
    assert all(0 < earlier[name].direction < found[name].direction for name in found)


def test_recording_does_not_change_training(tmp_path):
    losses = []
    for steps in (1, 100):
        torch.manual_seed(0)
        model = get_peft_model(llama(), config("dora", init_lora_weights=True))
        trainer = fit(model, tmp_path, DecompositionCallback(steps), logging_steps=1, seed=1)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]


def test_a_resumed_run_goes_on_from_its_records(tmp_path):
    def start(**options):
        torch.manual_seed(0)
        callback = DecompositionCallback(1, tmp_path / "pattern.json")
        model = get_peft_model(llama(), config("dora", init_lora_weights=True))
        fit(model, tmp_path, callback, save_strategy="steps", save_steps=2, **options)
        return callback.history

    whole = start(max_steps=4)
    assert {entry["step"] for entry in whole} == {1, 2, 3, 4}
    resumed = start(max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert [(e["step"], e["module"]) for e in resumed] == [(e["step"], e["module"]) for e in whole]
    assert at(resumed, 1) == at(whole, 1)
    assert_equal(at(resumed, 4), at(whole, 4), rel=1e-5)


def test_full_fine_tuning_resumes_only_with_a_reference(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    fit(llama(), tmp_path, DecompositionCallback(2), 2, **options)
    with pytest.raises(ValueError, match=r"resumes at step 2.*`reference`"):
        fit(llama(), tmp_path, DecompositionCallback(2), 4, resume=str(tmp_path / "checkpoint-2"), **options)
    callback = DecompositionCallback(2, reference=llama())
    trainer = fit(llama(), tmp_path, callback, 4, resume=str(tmp_path / "checkpoint-2"), **options)
    assert_equal(at(callback.history, 4), decompose(trainer.model, reference=llama()), rel=1e-12)


def test_the_last_record_is_not_of_the_best_model(tmp_path):
    callback = DecompositionCallback(2)
    rows = torch.randint(3, 32, (4, 6))
    model = get_peft_model(llama(), config("lora", init_lora_weights=True))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-2,
        greater_is_better=True,
        metric_for_best_model="loss",
    )  # the "best" model is that of the first step
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]).train()
    last = decompose_folder(llama(), tmp_path / "checkpoint-3")
    assert_equal(at(callback.history, 3), last, rel=1e-9)
    assert decompose(model) != last  # or the test shows nothing


def test_a_run_that_stops_early_records_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callback = DecompositionCallback(2)
    model = get_peft_model(llama(), config("lora", init_lora_weights=True))
    trainer = fit(model, tmp_path, callback, extra=Stop())
    assert sorted({entry["step"] for entry in callback.history}) == [2, 3]
    assert_equal(at(callback.history, 3), decompose(model), rel=1e-12)
    # unless other weights have taken the place of the last step's
    before, trainer.state.global_step = list(callback.history), 4
    arguments = type("Arguments", (), {"load_best_model_at_end": True})()
    callback.on_train_end(arguments, trainer.state, None, model=model)
    assert callback.history == before


def test_other_processes_and_bad_intervals():
    callback = DecompositionCallback(1)
    state = type("State", (), {"is_world_process_zero": False, "global_step": 1, "max_steps": 1})()
    callback.on_train_begin(None, state, None, model=None)
    callback.on_step_end(None, state, None, model=None)
    assert callback.history == []
    state.is_world_process_zero, state.global_step = True, 0
    with pytest.raises(ValueError, match="adapter named 'other'"):
        DecompositionCallback(1, adapter="other").on_train_begin(None, state, None, model=trained("dora"))
    with pytest.raises(ValueError, match="at least 1, found 0"):
        DecompositionCallback(0)


# ---- correlation


def records(x, y, modules=None):
    """x and y [modules, checkpoints]"""
    return [
        entry
        for step in range(x.shape[1])
        for entry in to_history(
            step, {f"layers.{i}.q": Change(y[i, step].item(), x[i, step].item()) for i in range(len(x))}
        )
    ]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_correlation_of_a_known_relation(sign):
    x = torch.rand(30, 3, dtype=torch.float64)
    y = 5 + sign * x + 0.2 * torch.randn_like(x)
    found = correlate(records(1e-12 * x, 1e-3 * y))
    expected = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
    assert found.r == pytest.approx(expected, rel=1e-9)
    assert sign * found.r > 0.7
    assert found.low < found.r < found.high
    assert found.low * found.high > 0
    assert found.count == 90
    assert correlate(records(1e-12 * x, 1e-3 * y)) == found
    assert correlate(records(1e-12 * x, 1e-3 * y), seed=1) != found
    narrow = correlate(records(1e-12 * x, 1e-3 * y), level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_repeated_points_of_a_module_do_not_narrow_the_interval():
    x = torch.rand(20, 1, dtype=torch.float64)
    y = x + torch.randn_like(x)
    once, repeated = correlate(records(x, y)), records(x.expand(20, 9), y.expand(20, 9))
    repeated.sort(key=lambda entry: entry["magnitude"])  # whatever the order
    clustered = correlate(repeated)
    assert clustered.r == pytest.approx(once.r, rel=1e-9)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.2)  # modules in another order
    naive = correlate([entry | {"module": str(i)} for i, entry in enumerate(repeated)])
    assert naive.r == pytest.approx(clustered.r)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_correlations_that_do_not_exist():
    x = torch.rand(5, 2)
    for history in (records(x, torch.full((5, 2), 0.1)), records(torch.zeros(5, 2), x), []):
        found = correlate(history)
        assert all(math.isnan(value) for value in found[:3])
        assert found.count == len(history)
    one = correlate(records(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 7.0]])))
    assert one.r > 0.9
    assert math.isnan(one.low)
    assert math.isnan(correlate(records(x, torch.full((5, 2), math.nan))).r)
    with pytest.raises(ValueError, match="level between 0 and 1"):
        correlate([], level=95)


def test_layer_kind():
    assert layer_kind("model.layers.3.self_attn.q_proj") == "q_proj"
    assert layer_kind("linear") == "linear"


# ---- figures and the command


def histories():
    x = torch.rand(6, 3, dtype=torch.float64) * 1e-4
    return {"LoRA": records(x, 20 * x), "DoRA": records(2 * x, 1 - x)}


def test_figures_are_written_whole(tmp_path):
    buffer = io.BytesIO()
    draw_pattern(histories(), "title", buffer)
    assert buffer.getvalue().startswith(b"\x89PNG")
    for draw in (draw_pattern, draw_trajectories):
        draw(histories(), "title", tmp_path / "figures" / f"{draw.__name__}.svg")
        text = (tmp_path / "figures" / f"{draw.__name__}.svg").read_text()
        assert "</svg>" in text
    assert len(list((tmp_path / "figures").iterdir())) == 2
    still = records(torch.zeros(2, 2), torch.ones(2, 2))  # no line, no logarithm, and no warning
    for draw in (draw_pattern, draw_trajectories):
        draw({"magnitudes alone": still}, "title", buffer)
    with pytest.raises(ValueError, match="found none"):
        draw_pattern({}, "title", buffer)


def test_the_command_compares_runs_and_single_folders(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    dora = get_peft_model(llama(), config("dora", init_lora_weights=True))
    fit(dora, tmp_path / "trained", DecompositionCallback(2), 4, save_strategy="steps", save_steps=2)
    trained("lora").save_pretrained(tmp_path / "lora")
    nudged(llama()).save_pretrained(tmp_path / "full")
    output = tmp_path / "figures" / "pattern.png"
    runs = [str(tmp_path / name) for name in ("trained", "lora", "full")]
    analysis.main([str(tmp_path / "base"), *runs, "--output", str(output), "--modules", "q_proj|v_proj"])

    content = json.loads(output.with_suffix(".json").read_text())
    assert list(content["runs"]) == ["trained", "lora", "full"]
    run = content["runs"]["trained"]
    assert {entry["step"] for entry in run["history"]} == {2, 4}
    assert_equal(at(run["history"], 4), decompose(dora, target="q_proj|v_proj"), rel=1e-12)
    assert list(run["kinds"]) == ["q_proj", "v_proj"]
    expected = correlate(run["history"])
    assert run["correlation"] == pytest.approx(expected._asdict())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trained"))
    count, r, low, high = (float(part.strip("[],")) for part in line.replace("[", " ").split()[1:])
    assert (count, r, low, high) == pytest.approx((expected.count, *expected[:3]), abs=5.1e-3)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert output.with_name("pattern_trajectories.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}", "{missing}"], "no such folder"),
        (["{missing}", "{lora}"], "missing"),
        (["{base}", "{lora}", "--modules", "banana"], "path matches 'banana'"),
        (["{base}", "{lora}", "--modules", "("], "missing \\)"),
        (["{base}", "{lora}", "--model_class", "AutoBanana"], "AutoBanana"),
    ],
)
def test_errors_of_the_command(arguments, message, tmp_path, capsys):
    folders = {"base": tmp_path / "base", "lora": tmp_path / "lora", "missing": tmp_path / "missing"}
    llama().save_pretrained(folders["base"])
    trained("lora").save_pretrained(folders["lora"])
    output = tmp_path / "out" / "pattern.png"
    with pytest.raises(SystemExit):
        analysis.main([part.format(**folders) for part in arguments] + ["--output", str(output)])
    error = capsys.readouterr().err
    assert "error: " in error
    assert message.replace("\\", "") in error
    assert not output.parent.exists()
