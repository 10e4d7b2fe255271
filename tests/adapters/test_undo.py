"""`Undo` and `restored_on_failure` by themselves; with every operation in tests/whole/test_rollback.py."""

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.adapters.undo import Undo, restored_on_failure, switched
from dora_peft.bases.offload import hook_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.names, self.kinds, self.numbers = ["first"], {"linear"}, {"first": 1}

    def forward(self, x):
        return self.last(self.first(x))


def adapted():
    torch.manual_seed(0)
    return get_peft_model(Net(), DoraConfig(r=2, target_modules=["first"], bias="all", init_lora_weights=False))


def test_attributes_children_and_containers_are_the_same_objects_with_the_same_contents():
    net = Net()
    first, parameters, names = net.first, dict(net.named_parameters()), net.names
    handle = net.register_forward_hook(lambda *_: None)
    undo = Undo(net)
    net.first = nn.Identity()
    net.extra = 3
    net.names.append("other")
    net.kinds.clear()
    net.numbers["second"] = 2
    net.last.weight = nn.Parameter(torch.zeros(2, 4))
    net.last.added = nn.Linear(1, 1)
    net.last.register_buffer("buffer", torch.zeros(1))
    net.eval()
    del net.last.bias
    handle.remove()
    undo()
    assert net.first is first
    assert not hasattr(net, "extra")
    assert net.names is names
    assert (net.names, net.kinds, net.numbers) == (["first"], {"linear"}, {"first": 1})
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert net.training
    assert net.last.training
    assert not list(net.buffers())
    assert len(net._forward_hooks) == 1


def test_a_success_keeps_what_was_changed():
    net = Net()
    with restored_on_failure(net):
        net.first = nn.Identity()
    assert isinstance(net.first, nn.Identity)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
def test_whatever_ends_the_body_passes_through(error):
    net = Net()

    def fail():
        with restored_on_failure(net):
            net.first = nn.Identity()
            raise error

    with pytest.raises(error):
        fail()
    assert isinstance(net.first, nn.Linear)


def test_trainability_is_restored():
    net = Net()
    net.first.bias.requires_grad_(False)
    undo = Undo(net)
    net.first.requires_grad_(True)
    net.last.requires_grad_(False)
    undo()
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["first.bias"]


@pytest.mark.parametrize("change", ["in place", "other data", "other dtype"])
def test_an_adapter_that_may_be_overwritten_is_copied_with_the_biases(change):
    model = adapted()
    written = {n: p for n, p in model.named_parameters() if ".lora_" in n or n.endswith(".bias")}
    before = {name: parameter.detach().clone() for name, parameter in written.items()}
    undo = Undo(model, "default")
    with torch.no_grad():
        for parameter in written.values():
            if change == "in place":
                parameter.zero_()
            else:
                parameter.data = torch.zeros_like(parameter, dtype=torch.float64 if "dtype" in change else None)
    undo()
    assert len(written) == 5
    for name, parameter in written.items():
        assert torch.equal(parameter, before[name]), name


def test_of_several_copies_the_first_counts():
    net = Net()
    weight = net.first.weight
    before = weight.detach().clone()
    undo = Undo(net)
    undo.remember(weight, weight.detach().clone())
    weight.data.zero_()
    undo.remember(weight, weight.detach().clone())
    undo()
    assert torch.equal(weight, before)


def test_configs_and_accelerates_hooks_are_restored():
    model = adapted()
    cpu_offload(model.base_model.model.last, execution_device="cpu")
    config, hook = model.peft_config["default"], hook_of(model.base_model.model.last)
    weights = hook.weights_map
    undo = Undo(model)
    config.r, hook.weights_map = 7, {}
    config.rank_pattern["first"] = 3
    model.peft_config["other"] = config
    undo()
    assert list(model.peft_config) == ["default"]
    assert (config.r, config.rank_pattern) == (2, {})
    assert hook.weights_map is weights


def test_the_modules_that_a_switch_changes():
    model = adapted()
    layer = model.base_model.model.first
    assert [type(m).__name__ for m in switched(model)] == ["PeftModel", "Linear", "Linear"]
    assert switched(model)[1:] == [layer, layer.base_layer]
