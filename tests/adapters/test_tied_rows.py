"""Zero rows of W0 stay tied (c = 1) on every road that rewrites or rebuilds an adapter."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from ties_fixtures import (
    LAYERS,
    RANGES,
    RANK,
    ROWS,
    One,
    adapted,
    base,
    edit,
    example,
    is_tied,
    layer_of,
    train,
    without_record,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig
from dora_peft.plugin.configs import plain_peft_configs

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False) but the target module is"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def from_pretrained(folder, kind, **options):
    return PeftModel.from_pretrained(base(kind), folder, **options), "default"


def given_config(folder, kind):
    config = DoraConfig(r=RANK.get(kind, 4), lora_alpha=3, target_modules=["layer"])
    return PeftModel.from_pretrained(base(kind), folder, config=config), "default"


def low_cpu_mem_usage(folder, kind):
    return from_pretrained(folder, kind, low_cpu_mem_usage=True)


def second_adapter(folder, kind):
    model = adapted(kind)
    model.load_adapter(str(folder), "second")
    return model, "second"


def over_an_existing_one(folder, kind):
    """What Trainer does to resume."""
    model = adapted(kind)
    model.load_adapter(str(folder), "default")
    return model, "default"


def hotswap(folder, kind):
    model = train(adapted(kind))
    # whatever the old adapter had
    layer_of(model)._norms["default"].tied = None
    model.base_model.hotswap_adapter(str(folder))
    return model, "default"


def state_dict(folder, kind):
    model = adapted(kind)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model, "default"


ROADS = [
    from_pretrained,
    given_config,
    low_cpu_mem_usage,
    second_adapter,
    over_an_existing_one,
    hotswap,
    state_dict,
]


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "guessed"])
@pytest.mark.parametrize("zero_rows", [True, False], ids=["trained", "still zero"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_an_edit_right_after_loading_does_not_loosen_them(road, kind, zero_rows, known, tmp_path):
    model = train(adapted(kind), zero_rows)
    with torch.no_grad():
        expected = model(example(kind))
    model.save_pretrained(tmp_path)
    if not known:
        without_record(tmp_path)
    loaded, adapter = road(tmp_path, kind)
    layer = layer_of(loaded)
    edit(layer, adapter)
    assert is_tied(layer, adapter)
    with torch.no_grad():
        layer.factor_parameters(adapter)[1][ROWS] -= 0.25
        loaded.set_adapter(adapter)
        torch.testing.assert_close(loaded.eval()(example(kind)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "guessed"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_rows", [True, False], ids=["trained", "still zero"])
def test_low_precision(zero_rows, dtype, autocast, known, tmp_path):
    train(adapted("linear", dtype, autocast), zero_rows).save_pretrained(tmp_path)
    if not known:
        without_record(tmp_path)
    model = PeftModel.from_pretrained(base("linear", dtype), tmp_path, autocast_adapter_dtype=autocast)
    edit(layer_of(model))
    assert layer_of(model)._norms["default"].tied.nonzero()[:, 0].tolist() == ROWS
    assert (layer_of(model).scale("default")[ROWS] == 1).all()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for name in ("o_proj", "q_proj"):
            model.get_submodule(f"model.layers.0.self_attn.{name}").weight[ROWS] = 0
    return model


@pytest.mark.parametrize("writer", ["peft", "transformers"])
@pytest.mark.parametrize("known", [True, False], ids=["recorded", "guessed"])
def test_transformers_own_functions(known, writer, tmp_path):
    config = DoraConfig(r=2, target_modules=["o_proj"], magnitude_only_modules=["q_proj"])
    ids = torch.arange(8)[None]
    if writer == "peft":
        model = get_peft_model(llama(), config).eval()
        attention = model.base_model.model.model.layers[0].self_attn
    else:
        model = llama()
        model.add_adapter(config)
        attention = model.eval().model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.lora_B["default"].weight[8:] += 0.1
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["dora_peft"]
    assert own["tied_rows"] == {f"model.layers.0.self_attn.{name}": RANGES for name in ("q_proj", "o_proj")}
    if not known:
        without_record(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path))
    attention = loaded.model.layers[0].self_attn
    edit(attention.o_proj)
    assert (attention.o_proj.scale("default")[ROWS] == 1).all()
    assert (attention.q_proj.scale("default")[ROWS] == 1).all()
    assert not any(factor.any() for factor in attention.q_proj.factor_parameters("default"))
    with torch.no_grad():
        attention.o_proj.lora_B["default"].weight[ROWS] -= 0.25
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_rows", [True, False], ids=["trained", "still zero"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_plain_peft_gets_finite_rows_near_ours(kind, dtype, autocast, zero_rows, tmp_path):
    model = train(adapted(kind, dtype, autocast), zero_rows)
    x = example(kind, dtype)
    with torch.no_grad():
        expected = model(x).float()
    model.save_pretrained(tmp_path)
    with plain_peft_configs(), torch.no_grad():
        plain = PeftModel.from_pretrained(base(kind, dtype), tmp_path, autocast_adapter_dtype=autocast).eval()
        assert isinstance(plain.peft_config["default"], LoraConfig)
        found = plain(x).float()
    assert found.isfinite().all()
    coarse = dtype != torch.float32
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-2 if coarse else 1e-5)


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 512])
@pytest.mark.parametrize("alpha", [0.01, 4, 256])
def test_entries_for_plain_peft_survive_every_dtype(alpha, width, adapter_dtype, base_dtype, tmp_path):
    def wide():
        torch.manual_seed(0)
        layer = nn.Linear(width, 8, bias=False)
        with torch.no_grad():
            layer.weight[ROWS] = 0
        return One(layer).to(base_dtype)

    model = get_peft_model(wide(), DoraConfig(r=4, lora_alpha=alpha, target_modules=["layer"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, width, dtype=base_dtype)
    for autocast in (True, False) if adapter_dtype == base_dtype else (True,):
        with plain_peft_configs(), torch.no_grad():
            plain = PeftModel.from_pretrained(wide(), tmp_path, autocast_adapter_dtype=autocast)
            found = plain(x)
        assert found.isfinite().all()
        half = torch.float16 in (adapter_dtype, base_dtype)
        assert found[:, ROWS].abs().max() < (0.02 if half else 1e-9)


def test_other_tensors_than_the_models_own_are_saved_with_their_own_norm(tmp_path):
    """An average of the weights, say: m follows the norm of what is in the file."""
    model = train(adapted("linear"))
    average = {key: value.clone() for key, value in model.state_dict().items()}
    average["base_model.model.layer.lora_B.default.weight"] *= 2
    model.save_pretrained(tmp_path, state_dict=average)
    tensors = {k.partition("lora_")[2]: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    norm = (layer_of(model).scaling["default"] * tensors["B.weight"] @ tensors["A.weight"]).norm(dim=1)
    torch.testing.assert_close(tensors["magnitude_vector.weight"][ROWS], norm[ROWS])


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_of_a_mutated_base(init, trained, tmp_path):
    def net():
        both = base("linear")
        both.only = copy.deepcopy(both.layer)
        both.forward = lambda x: both.only(both.layer(x))
        return both

    config = DoraConfig(r=3, target_modules=["layer"], magnitude_only_modules=["only"], init_lora_weights=init)
    model = get_peft_model(net(), config).eval()
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = init
    if trained:
        train(model)
    with torch.no_grad():
        expected = model(example("linear"))
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with plain_peft_configs(), torch.no_grad():
        plain = PeftModel.from_pretrained(net(), tmp_path / "converted").eval()(example("linear"))
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-3)
    loaded = PeftModel.from_pretrained(net(), tmp_path / "converted").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(example("linear")), expected, rtol=1e-3, atol=1e-3)
    edit(layer_of(loaded))
    assert (layer_of(loaded).scale("default")[ROWS] == 1).all()


def test_a_layer_that_the_checkpoint_does_not_fit_keeps_its_own(tmp_path):
    train(adapted("linear", r=2)).save_pretrained(tmp_path)
    model = adapted("linear")
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        set_peft_model_state_dict(
            model, load_file(tmp_path / "adapter_model.safetensors"), ignore_mismatched_sizes=True
        )
    edit(layer_of(model))
    assert (layer_of(model).scale("default")[ROWS] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_guess_from_a_low_precision_file_that_was_stored_in_fp32(dtype, tmp_path):
    train(adapted("linear", dtype, False)).save_pretrained(tmp_path)
    without_record(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    layer = layer_of(PeftModel.from_pretrained(base("linear"), tmp_path))
    assert layer._norms["default"].tied.nonzero()[:, 0].tolist() == ROWS
