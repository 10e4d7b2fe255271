"""Zero rows of W0 stay tied (c = 1) on every road that rewrites or rebuilds an adapter."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig
from dora_peft._row_ranges import checked_record, recorded, to_mask, to_ranges
from dora_peft.norms.ties import settle_late
from dora_peft.plugin.configs import plain_peft_configs

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False) but the target module is"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]
ROWS = [0, 1, 5]
RANGES = [[0, 2], [5, 6]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "Conv1D": lambda: Conv1D(8, 8),
    "embedding": lambda: nn.Embedding(12, 8),
    "conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8),
}
RANK = {"depthwise": 8}


def base(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        layer.weight.normal_()
        rows = layer.weight.T if kind in ("Conv1D", "embedding") else layer.weight
        rows[ROWS] = 0
    return One(layer).to(dtype).eval()


def example(kind, dtype=torch.float32):
    torch.manual_seed(1)
    shape = {"conv2d": (2, 8, 4, 4), "grouped": (2, 8, 4, 4), "depthwise": (2, 8, 5)}.get(kind, (3, 8))
    return torch.arange(12).view(3, 4) if kind == "embedding" else torch.randn(shape).to(dtype)


def adapted(kind, dtype=torch.float32, autocast=True, **options):
    config = DoraConfig(**{"r": RANK.get(kind, 4), "lora_alpha": 3, "target_modules": ["layer"], **options})
    return get_peft_model(base(kind, dtype), config, autocast_adapter_dtype=autocast).eval()


@torch.no_grad()
def train(model, zero_rows=True, adapter="default"):
    """As after some steps; without `zero_rows` these have not moved yet."""
    torch.manual_seed(2)
    layer = model.base_model.model.layer
    layer.scale(adapter)
    lora_A, lora_B = layer.factor_parameters(adapter)
    lora_B.add_(0.3 * torch.randn(lora_B.shape))
    if isinstance(layer.get_base_layer(), nn.Embedding):
        lora_A.add_(0.3 * torch.randn(lora_A.shape))
    if not zero_rows:
        lora_B[ROWS] = 0
    m = layer.magnitude(adapter)
    free = [i for i in range(8) if i not in ROWS]
    m.view(-1)[free] *= 1.3
    return model


@torch.no_grad()
def edit(layer, adapter="default"):
    """B changes before anything has been computed with the adapter."""
    layer.factor_parameters(adapter)[1][ROWS] += 0.25


def is_tied(layer, adapter="default"):
    c = layer.scale(adapter).detach().float()
    free = [i for i in range(8) if i not in ROWS]
    return bool((c[ROWS] == 1).all()) and bool((c[free] != 1).all())


def layer_of(model):
    return (model.base_model.model if isinstance(model, PeftModel) else model).layer


def without_record(folder):
    """As an earlier version wrote it."""
    path = folder / "adapter_config.json"
    entries = json.loads(path.read_text())
    for name in ("tied_rows", "filled_rows"):
        del entries["auto_mapping"]["dora_peft"][name]
    path.write_text(json.dumps(entries))
    return folder


# ---- the record


def test_ranges_and_masks():
    mask = torch.tensor([True, True, False, True, False, False, True])
    assert to_ranges(mask) == [[0, 2], [3, 4], [6, 7]]
    assert torch.equal(to_mask(to_ranges(mask), 7), mask)
    assert to_ranges(torch.zeros(3, dtype=torch.bool)) == []
    assert to_mask([], 3) is None
    for wrong in ([[0, 9]], [[-1, 2]], [[2, 2]]):
        with pytest.raises(ValueError, match="of a layer with 7 rows"):
            to_mask(wrong, 7)


def test_a_record_for_other_names_says_nothing_about_ours():
    record = {"a": [[0, 1]]}
    assert recorded(None, "a", 2, {"a"}) is False
    assert recorded(record, "a", 2, {"a", "b"}).tolist() == [True, False]
    assert recorded(record, "b", 2, {"a", "b"}) is None
    assert recorded(record, "renamed.a", 2, {"renamed.a"}) is False


@pytest.mark.parametrize("wrong", [[], {"a": 3}, {"a": [3]}, {"a": [[1]]}, {"a": [["0", "1"]]}, {"a": [[0, True]]}])
def test_a_damaged_record_is_named(wrong):
    with pytest.raises(ValueError, match=r"tied_rows.*expected \{module name"):
        checked_record(wrong, "tied_rows")


@pytest.mark.parametrize("zero_rows", [True, False])
def test_the_folder_says_which_rows_are_tied(zero_rows, tmp_path):
    train(adapted("linear"), zero_rows).save_pretrained(tmp_path)
    own = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["dora_peft"]
    assert own["tied_rows"] == {"layer": RANGES}
    assert own["filled_rows"] == ({} if zero_rows else {"layer": RANGES})
    assert DoraConfig.from_pretrained(str(tmp_path)).tied_rows == {"layer": RANGES}


def test_a_folder_without_zero_rows_says_that_there_are_none(tmp_path):
    get_peft_model(One(nn.Linear(4, 4)), DoraConfig(target_modules=["layer"])).save_pretrained(tmp_path)
    assert DoraConfig.from_pretrained(str(tmp_path)).tied_rows == {}


def test_rows_that_the_layer_does_not_have_are_refused(tmp_path):
    adapted("linear").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        path.read_text()
        .replace("[\n            5,\n            6", "[\n            5,\n            60")
        .replace("6\n", "60\n")
    )
    with pytest.raises(ValueError, match=r"rows 5:60 of a layer with 8 rows"):
        PeftModel.from_pretrained(base("linear"), tmp_path)


# ---- the roads


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
    layer_of(model)._norms["default"].tied = None  # whatever the old adapter had
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


# ---- plain PEFT


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


# ---- magnitude-only, combined, copied, converted


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "guessed"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "embedding", "grouped", "depthwise"])
def test_magnitude_only_modules(kind, known, tmp_path):

    config = DoraConfig(r=2, target_modules=["other"], magnitude_only_modules=["layer"])

    def net():
        both = base(kind)
        both.other = nn.Linear(2, 2)
        return both

    model = get_peft_model(net(), config).eval()
    layer = layer_of(model)
    with torch.no_grad():
        layer.magnitude("default").view(-1)[[2, 3, 4, 6, 7]] *= 1.5
        expected = model(example(kind))
    model.save_pretrained(tmp_path)
    if not known:
        without_record(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    layer = layer_of(loaded)
    assert not any(factor.any() for factor in layer.factor_parameters("default"))
    assert is_tied(layer)
    with plain_peft_configs(), torch.no_grad():
        plain = PeftModel.from_pretrained(net(), tmp_path).eval()(example(kind))
    with torch.no_grad():
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(example(kind)), expected, rtol=1e-4, atol=1e-5)
        if kind not in ("grouped", "depthwise"):
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(example(kind)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "embedding"])
def test_a_row_tied_in_all_parts_is_tied_in_their_sum(kind, combination_type):
    model = train(adapted(kind))
    model.add_adapter("other", DoraConfig(r=4, target_modules=["layer"]))
    train(model, adapter="other")
    if kind == "conv2d" and combination_type == "svd":
        pytest.skip("as for the other kinds")
    model.base_model.add_weighted_adapter(
        ["default", "other"], [0.7, 0.5], "sum", combination_type=combination_type, svd_rank=3
    )
    edit(layer_of(model), "sum")
    assert is_tied(layer_of(model), "sum")


def test_a_row_tied_in_one_part_only_is_not_tied_in_the_sum():
    model = train(adapted("linear"))
    model.add_adapter("other", DoraConfig(r=4, target_modules=["layer"]))
    layer_of(model)._norms["other"].tied = None
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "sum")
    assert layer_of(model)._norms["sum"].tied is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_keep_them(kind, duplicate, tmp_path):
    train(adapted(kind)).save_pretrained(tmp_path)
    copied = duplicate(PeftModel.from_pretrained(base(kind), tmp_path))
    edit(layer_of(copied))
    assert is_tied(layer_of(copied))
    assert copied.peft_config["default"].tied_rows == {"layer": RANGES}


def test_other_tensors_than_the_models_own_are_saved_with_their_own_norm(tmp_path):
    """An average of the weights, say: m follows the norm of what is in the file."""
    model = train(adapted("linear"))
    average = {key: value.clone() for key, value in model.state_dict().items()}
    average["base_model.model.layer.lora_B.default.weight"] *= 2
    model.save_pretrained(tmp_path, state_dict=average)
    tensors = {k.partition("lora_")[2]: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    norm = (layer_of(model).scaling["default"] * tensors["B.weight"] @ tensors["A.weight"]).norm(dim=1)
    torch.testing.assert_close(tensors["magnitude_vector.weight"][ROWS], norm[ROWS])


def test_saving_does_not_change_the_model():
    model = train(adapted("grouped"), zero_rows=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    get_peft_model_state_dict(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


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


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_2", "olora", "gaussian"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_initialisations_that_blur_zero_rows(kind, init):
    """Their rounding noise is no direction: the rows are tied as with any other initialisation."""
    if (kind, init) == ("Conv1D", "olora"):
        pytest.skip("PEFT subtracts the untransposed product from a transposed weight")
    model = adapted(kind, init_lora_weights=init)
    layer = layer_of(model)
    assert layer._norms["default"].tied.nonzero()[:, 0].tolist() == ROWS
    with torch.no_grad():
        torch.testing.assert_close(model(example(kind)), base(kind)(example(kind)))
    edit(layer)
    assert (layer.scale("default")[ROWS] == 1).all()


def test_a_base_that_comes_after_its_adapter(tmp_path):
    """Its rows are found once it is here, at the latest at the first use."""
    train(adapted("linear")).save_pretrained(tmp_path)
    without_record(tmp_path)
    model = PeftModel.from_pretrained(base("linear").to("meta"), tmp_path)
    layer = layer_of(model)
    with pytest.raises(RuntimeError, match=r"'layer' is on the meta device"):
        settle_late(layer, "default")
    layer.base_layer.load_state_dict(base("linear").layer.state_dict(), assign=True)
    assert settle_late(layer, "default").nonzero()[:, 0].tolist() == ROWS
    edit(layer)
    assert is_tied(layer)


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
