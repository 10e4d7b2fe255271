"""How an adapter's tensors and modules are named in a model, a checkpoint and a config's patterns."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import nn

from dora_peft import DoraConfig
from dora_peft.adapters.names import belongs_to, exactly, to_parameter_names


def model(*adapters):
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "up": nn.Linear(4, 4), "block": nn.ModuleDict({"up": nn.Linear(4, 4)})}
    )
    config = DoraConfig(r=2, target_modules=["embed", "up"], init_lora_weights=False)
    adapted = get_peft_model(base, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        adapted.add_adapter(name, config)
    return adapted


@pytest.mark.parametrize("name", ["up", "layers.1.up", "a+b.c(d)", "model.h.0"])
def test_an_exact_pattern_matches_its_module_alone(name):
    patterns = {exactly(name): 1}
    assert get_pattern_key(list(patterns), name) == exactly(name)
    # where a bare name matches the end of another's, or a dot stands for any letter
    for other in (f"block.{name}", f"x{name}", name.replace(".", "x") + "y", name[:-1]):
        assert get_pattern_key(list(patterns), other) == other


def test_the_parameters_of_an_adapter_are_found_by_name():
    adapted = model("default", "fault", "default2")
    for adapter in adapted.peft_config:
        found = {n for n, _ in adapted.named_parameters() if belongs_to(n, adapter)}
        layers = [m for m in adapted.modules() if adapter in getattr(m, "r", {})]
        own = {id(p) for layer in layers for p in layer.factor_parameters(adapter)}
        own |= {id(layer.lora_magnitude_vector[adapter].weight) for layer in layers}
        assert {id(p) for n, p in adapted.named_parameters() if n in found} == own
        assert len(found) == 3 * len(layers) == 9


@pytest.mark.parametrize(
    ("name", "adapter", "expected"),
    [
        ("up.lora_A.default.weight", "default", True),
        ("embed.lora_embedding_A.default", "default", True),
        ("up.lora_magnitude_vector.default.weight", "default", True),
        ("up.lora_A.default2.weight", "default", False),
        ("up.lora_A.second.weight", "default", False),
        # the module, not the adapter, has the name
        ("default.lora_A.second.weight", "default", False),
        ("default.up.base_layer.weight", "default", False),
        ("up.base_layer.bias", "default", False),
    ],
)
def test_a_parameters_owner(name, adapter, expected):
    assert belongs_to(name, adapter) is expected


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_checkpoints_tensors_get_the_parameters_names(prefixed):
    """Of two adapters, with PeftModel's prefix, or named from the base model as transformers does."""
    adapted = model("default", "second")
    tensors = get_peft_model_state_dict(adapted, adapter_name="second")
    assert len(tensors) == 9
    inner = adapted if prefixed else adapted.base_model.model
    named = to_parameter_names(inner, "second", tensors)
    parameters = dict(inner.named_parameters())
    assert named.keys() == {n for n in parameters if belongs_to(n, "second")}
    assert all(torch.equal(tensor, parameters[n]) for n, tensor in named.items())


def test_a_tensor_of_no_parameter_keeps_its_name():
    other = torch.zeros(1)
    named = to_parameter_names(model("default"), "default", {"somewhere.lora_A.weight": other})
    assert list(named) == ["somewhere.lora_A.weight"]
    assert named["somewhere.lora_A.weight"] is other
