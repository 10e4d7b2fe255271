"""Adapters keep their precision: loading without a copy in memory, and casts from outside that freeze magnitudes."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from dora_peft import DoraConfig
from dora_peft.layers.magnitude import Magnitude, warn_about_low_precision

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
]
LOW = [torch.bfloat16, torch.float16]
TARGETS = ["linear", "embed", "conv"]


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(5, 8), "linear": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)}).to(dtype)


def config(cls=DoraConfig):
    return cls(r=2, target_modules=TARGETS)


def tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def saved(folder, dtype, **options):
    model = get_peft_model(net(dtype), config(), **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return tensors(model)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_low_cpu_mem_usage_loads_what_is_loaded_without_it(autocast, dtype, tmp_path):
    expected = saved(tmp_path, dtype)
    loaded = [
        PeftModel.from_pretrained(net(dtype), tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=autocast)
        for low in (False, True)
    ]
    equal(tensors(loaded[1]), tensors(loaded[0]))
    if autocast:
        equal(tensors(loaded[1]), expected)
    else:
        assert {t.dtype for t in tensors(loaded[1]).values()} == {dtype}


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_cpu_mem_usage_of_a_second_adapter(dtype, tmp_path):
    expected = saved(tmp_path, dtype)
    model = get_peft_model(net(dtype), config())
    model.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=True)
    found = {n.replace(".second", ".default"): t for n, t in tensors(model).items() if ".second" in n}
    equal(found, expected)


@pytest.mark.parametrize("road", ["get_peft_model", "inject"])
def test_low_cpu_mem_usage_by_peft_functions(road, tmp_path):
    saved(tmp_path, torch.bfloat16)
    state = load_file(tmp_path / "adapter_model.safetensors")
    found = []
    for low in (False, True):
        if road == "inject":
            model = inject_adapter_in_model(config(), net(), low_cpu_mem_usage=low)
            entries = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        else:
            model, entries = get_peft_model(net(), config(), low_cpu_mem_usage=low), state
        set_peft_model_state_dict(model, entries, low_cpu_mem_usage=low)
        found.append(tensors(model))
    equal(found[1], found[0])


def say(model):
    layers = [m for m in model.modules() if hasattr(m, "lora_magnitude_vector")]
    assert len(layers) == 3
    for layer in layers:
        warn_about_low_precision(layer.lora_magnitude_vector["default"], layer.name, layer.notices)


def silent(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say(model)


def cast_data(model, dtype):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def cast_trained(model, dtype):
    """What TRL does for QLoRA."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cast", [cast_data, cast_trained])
def test_a_cast_from_outside_is_warned_about_once(cast, dtype):
    model = get_peft_model(net(), config())
    silent(model)
    cast(model, dtype)
    with pytest.warns(
        UserWarning, match=r"magnitude of module '\w+' is in torch.*will not be trained.*\.float\(\)"
    ) as caught:
        say(model)
    assert len(caught) == 1
    silent(model)
    silent(copy.deepcopy(model))


def test_the_cure_that_the_warning_names():
    model = get_peft_model(net(), config())
    cast_data(model, torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Magnitude):
            module.float()
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, Magnitude))
    silent(model)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_cast_that_was_asked_for_is_not(dtype, tmp_path):
    silent(get_peft_model(net(dtype), config(), autocast_adapter_dtype=False))
    saved(tmp_path, dtype, autocast_adapter_dtype=False)
    for low in (False, True):
        model = PeftModel.from_pretrained(net(dtype), tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=low)
        assert {t.dtype for t in tensors(model).values()} == {dtype}
        silent(model)
        silent(copy.deepcopy(model))
    model = get_peft_model(net(dtype), config())
    for module in model.modules():
        if isinstance(module, Magnitude):
            module.cast(dtype)
    silent(model)


def test_another_model_is_warned_about_again():
    for _ in range(2):
        model = get_peft_model(net(), config())
        cast_data(model, torch.bfloat16)
        with pytest.warns(UserWarning, match="will not be trained"):
            say(model)


def test_lora_of_peft_is_left_alone():
    model = get_peft_model(net(), config(LoraConfig))
    assert not any(isinstance(module, Magnitude) for module in model.modules())
