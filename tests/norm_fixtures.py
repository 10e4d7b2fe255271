"""A model of two layers, its cached and its true norms, and what changes them."""

import torch
from torch import nn

from dora_peft import DoraConfig, reference


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def up(model):
    return model.base_model.model.up


def used(layer, adapter="default"):
    """The norm that a forward pass divides by."""
    return (layer.lora_magnitude_vector[adapter].weight / layer.scale(adapter)).detach()


def true(layer, adapter="default"):
    lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = layer.get_base_layer().weight
    return reference.weight_norm(weight, lora_A, lora_B, layer.scaling[adapter]).detach()


def train_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 6, dtype=next(model.parameters()).dtype)).square().sum().backward()
    optimizer.step()


def edit_A(model):
    with torch.no_grad():
        up(model).lora_A["default"].weight.mul_(2)


def edit_B(model):
    with torch.no_grad():
        up(model).lora_B["default"].weight[0] += 1


def edit_base(model):
    with torch.no_grad():
        up(model).get_base_layer().weight.add_(1)


def replace_base(model):
    up(model).get_base_layer().weight = nn.Parameter(torch.randn(10, 6), requires_grad=False)


def assign_data(model):
    parameter = up(model).lora_A["default"].weight
    parameter.data = parameter.data * 2


def load_state_dict(model):
    model.load_state_dict({name: tensor + 0.5 for name, tensor in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({name: tensor + 0.5 for name, tensor in model.state_dict().items()}, assign=True)


def assign_scaling(model):
    up(model).scaling["default"] = 0.1


def set_scale(model):
    up(model).set_scale("default", 3)


def scale_layer(model):
    up(model).scale_layer(3)


def new_adapter_of_the_same_name(model):
    model.add_adapter("other", DoraConfig(target_modules=["up"], init_lora_weights=False))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", DoraConfig(target_modules=["up"], init_lora_weights=False))


CHANGES = [
    edit_A,
    edit_B,
    edit_base,
    replace_base,
    assign_data,
    load_state_dict,
    load_assigned,
    assign_scaling,
    set_scale,
    scale_layer,
    new_adapter_of_the_same_name,
]
