"""NaN and infinity at an adapter's creation: the module is named, and the base model is as it was, to the bit."""

from types import SimpleNamespace

import pytest
import torch
from bad_input_fixtures import check_untouched, llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig, DoraLayer

NAN, INFINITY = float("nan"), float("inf")
DECOMPOSING = ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga", "loftq"]
OTHERS = [True, False, "gaussian", "orthogonal"]
LAYERS = {
    "linear": lambda: nn.Linear(6, 8),
    "bfloat16": lambda: nn.Linear(6, 8, dtype=torch.bfloat16),
    "conv1d of GPT-2": lambda: Conv1D(8, 6),
    "embedding": lambda: nn.Embedding(8, 6),
    "convolution": lambda: nn.Conv2d(3, 8, 2),
    "grouped convolution": lambda: nn.Conv2d(4, 8, 2, groups=2),
}


@pytest.fixture(autouse=True)
def loftq_on_the_cpu(monkeypatch):
    """PEFT's own asks for an accelerator. This one gives what a failed decomposition gives, of layer 1."""

    def init(weight, num_bits, reduced_rank, num_iter):
        found = torch.full_like(weight, NAN if len(weight) == 8 else 0.5)
        return found, found[:reduced_rank, :].clone(), found[:, :reduced_rank].clone()

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", init)


def config(init, **options):
    options |= {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    options |= {"corda_config": CordaConfig()} if init == "corda" else {}
    options |= {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
    return DoraConfig(**({"r": 2, "init_lora_weights": init, "target_modules": ["1"]} | options))


def prepared(init, broken=False):
    """A sound layer before the one that is adapted, and what CorDA and LoRA-GA compute from the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8))
    for layer in model:
        eigens = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        # PEFT's own class for these needs another package
        layer.eigens = SimpleNamespace(S_WC=eigens.S[:2].clone(), U_WC=eigens.U[:, :2], V_WC=eigens.Vh[:2].T)
        layer._peft_loraga_grad = torch.randn(layer.weight.shape)
    if broken:
        model[1]._peft_loraga_grad[0, 0] = NAN
        model[1].eigens.S_WC[0] = INFINITY
    return model


def state(model):
    layers = {name: vars(module).copy() for name, module in model.named_modules()}
    values = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return values, {name: (type(model.get_submodule(name)), sorted(held)) for name, held in layers.items()}


def same(found, expected):
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


@pytest.mark.parametrize("init", DECOMPOSING)
def test_an_initialisation_that_divides_by_zero(init):
    """s = 0: without the check PiSSA and CorDA leave NaN in W0, which no reload of the adapter mends."""
    model = prepared(init)
    before, eigens = state(model), model[0].eigens.S_WC.clone()
    both = config(init, lora_alpha=0, target_modules=["0", "1"])
    if init in ("olora", "lora_ga"):
        # they do not divide by s
        get_peft_model(model, both)
        assert all(p.isfinite().all() for p in model.parameters())
        return
    with pytest.raises(
        ValueError, match=r"on module '[01]': .*NaN or infinity in .*(lora_alpha > 0|init_lora_weights)"
    ):
        get_peft_model(model, both)
    same(state(model), before)
    # what the data gave is there for another try
    assert torch.equal(model[0].eigens.S_WC, eigens)
    if init != "loftq":
        get_peft_model(model, config(init, lora_alpha=4, target_modules=["0", "1"]))
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_an_initialisation_of_broken_data(init):
    """The module before is adapted already when the second fails."""
    model = prepared(init, broken=True)
    before = state(model)
    with pytest.raises(ValueError, match=r"module '1'.*(init_lora_weights=True|exclude_modules)"):
        get_peft_model(model, config(init, target_modules=["0", "1"]))
    same(state(model), before)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("init", [*OTHERS, *DECOMPOSING])
def test_a_base_weight_that_is_broken_already(init, value):
    model = prepared(init)
    with torch.no_grad():
        model[1].weight[3, 2] = value
    before = state(model)
    with pytest.raises(ValueError, match=r"module '1': .*NaN or infinity in W0 before .*intact base.*exclude_modules"):
        get_peft_model(model, config(init, target_modules=["0", "1"]))
    same(state(model), before)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    model = nn.Sequential(nn.Identity(), LAYERS[kind]())
    with torch.no_grad():
        model[1].weight.flatten()[-1] = NAN
    with pytest.raises(ValueError, match=r"module '1': .*NaN or infinity in W0 before"):
        get_peft_model(model, config(True))
    assert not any(isinstance(m, DoraLayer) for m in model.modules())
    with torch.no_grad():
        model[1].weight.flatten()[-1] = 0
    get_peft_model(model, config(True))


def test_factors_that_are_broken_alone(monkeypatch):
    """B is zero at first, so that a broken A would come up only after the first step."""
    model = prepared(True)

    def fill(tensor, *args, **kwargs):
        return tensor.data.fill_(INFINITY)

    monkeypatch.setattr(nn.init, "kaiming_uniform_", fill)
    before = state(model)
    with pytest.raises(ValueError, match=r"module '1': .*NaN or infinity in A.* after init_lora_weights=True"):
        get_peft_model(model, config(True))
    same(state(model), before)


def test_a_second_adapter():
    model = prepared("pissa")
    model = get_peft_model(model, config(True))
    before = state(model)
    with pytest.raises(ValueError, match=r"module '1'.*take lora_alpha > 0"):
        model.add_adapter("second", config("pissa", lora_alpha=0))
    same(state(model), before)
    assert list(model.peft_config) == ["default"]


def test_a_magnitude_only_module_needs_no_initialisation():
    model = prepared("pissa")
    both = config("pissa", lora_alpha=0, target_modules=[], magnitude_only_modules=["1"])
    get_peft_model(model, both)
    assert all(p.isfinite().all() for p in model.parameters())


def test_transformers_add_adapter():
    base = llama()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj'.*lora_alpha > 0"):
        base.add_adapter(config("pissa", lora_alpha=0, target_modules=["q_proj"]))
    check_untouched(base)


def test_loading_over_a_broken_base(tmp_path):
    """PEFT's own file: the base that it is loaded over holds NaN."""
    theirs = LoraConfig(r=2, use_dora=True, target_modules=["1"])
    get_peft_model(prepared(True), theirs).save_pretrained(tmp_path)
    base = prepared(True)
    with torch.no_grad():
        base[1].weight[0, 0] = NAN
    with pytest.raises(ValueError, match=r"module '1'.*W0 before"):
        PeftModel.from_pretrained(base, tmp_path, config=DoraConfig.from_pretrained(str(tmp_path)))
    assert not any(isinstance(m, DoraLayer) for m in base.modules())


def test_on_the_meta_device_nothing_is_known():
    with torch.device("meta"):
        model = nn.Sequential(nn.Identity(), nn.Linear(6, 8))
    get_peft_model(model, config(True), low_cpu_mem_usage=True)
    assert model[1].lora_magnitude_vector["default"].weight.is_meta
