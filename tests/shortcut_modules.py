"""What closes the shortcut of a linear layer, continued: what is put on, or in the place of, an adapter's modules."""

import torch
from shortcut_fixtures import differs_and_follows, prepared
from torch import nn
from torch.nn.modules import module as torch_module

from dora_peft.layers.magnitude import Magnitude


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledMagnitude(Magnitude):
    def forward(self):
        return 2 * super().forward()


def dropout_switched_apart(mode):
    """As for Monte Carlo estimates in evaluation."""
    _, layer, x = prepared(mode, dropout=0.9)
    dropout = layer.lora_dropout["default"]
    dropout.train(mode == "evaluation")
    with torch.set_grad_enabled(mode == "training"):
        assert torch.equal(layer(x), layer(x)) == (mode == "training")


def class_of_dropout(mode):
    """Of the same probability, but with nothing that drops."""
    _, layer, x = prepared(mode, dropout=0.5)
    layer.lora_dropout["default"].__class__ = nn.Identity
    with torch.set_grad_enabled(mode == "training"):
        assert torch.equal(layer(x), layer(x))


def replaced(mode, name, make):
    """Another module of the same class and content, with a hook: it is called."""
    _, layer, x = prepared(mode, dropout=0.5)
    held, seen = getattr(layer, name), []
    held["default"] = make(held["default"]).train(mode == "training")
    held["default"].register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(mode == "training"):
        layer(x)
    assert seen == [1]


def of_the_weight(old):
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    return new


def of_the_magnitude(old):
    new = Magnitude(old.weight.detach())
    new.weight = old.weight
    return new


def module_of_A(mode):
    replaced(mode, "lora_A", of_the_weight)


def module_of_B(mode):
    replaced(mode, "lora_B", of_the_weight)


def module_of_m(mode):
    replaced(mode, "lora_magnitude_vector", of_the_magnitude)


def module_of_dropout(mode):
    replaced(mode, "lora_dropout", lambda old: nn.Dropout(old.p))


def class_of(mode, name, cls):
    differs_and_follows(mode, lambda model, layer: setattr(getattr(layer, name)["default"], "__class__", cls))


def class_of_A(mode):
    class_of(mode, "lora_A", Doubled)


def class_of_B(mode):
    class_of(mode, "lora_B", Doubled)


def class_of_m(mode):
    class_of(mode, "lora_magnitude_vector", DoubledMagnitude)


def bias_of_B(mode):
    def change(model, layer):
        layer.lora_B["default"].bias = nn.Parameter(torch.ones(10))

    differs_and_follows(mode, change)


def forward_of_B(mode):
    def change(model, layer):
        module = layer.lora_B["default"]
        module.forward = lambda x: 2 * nn.functional.linear(x, module.weight)

    differs_and_follows(mode, change)


def hook_of(mode, name):
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        _, layer, x = prepared(mode, dropout=0.5)
        seen = []
        getattr(getattr(layer, name)["default"], register)(lambda *_, seen=seen: seen.append(1))
        with torch.set_grad_enabled(mode == "training"):
            for count in (1, 2):
                layer(x)
                assert len(seen) == count


def hook_of_A(mode):
    hook_of(mode, "lora_A")


def hook_of_B(mode):
    hook_of(mode, "lora_B")


def hook_of_m(mode):
    hook_of(mode, "lora_magnitude_vector")


def hook_of_dropout(mode):
    hook_of(mode, "lora_dropout")


def backward_hooks_of_factors(mode):
    for name in ("lora_A", "lora_B"):
        for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
            _, layer, x = prepared("training")
            seen = []
            getattr(getattr(layer, name)["default"], register)(lambda *_, seen=seen: seen.append(1) or None)
            layer(x.requires_grad_()).sum().backward()
            assert seen


def hook_that_comes_back(mode):
    """Hooks that are taken away for a while, dictionary and all, as some libraries do."""
    _, layer, x = prepared(mode)
    module, seen = layer.lora_B["default"], []
    module.register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(mode == "training"):
        layer(x)
        hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
        layer(x)
        layer(x)
        assert len(seen) == 1
        module._forward_hooks = hooks
        layer(x)
    assert len(seen) == 2


def hooks_of_all_modules(mode):
    _, layer, x = prepared(mode)
    seen = []
    handle = torch_module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        with torch.set_grad_enabled(mode == "training"):
            layer(x)
    finally:
        handle.remove()
    assert [m for m in seen if m is layer.base_layer] == [layer.base_layer]
    assert [m for m in seen if m is layer.lora_B["default"]] == [layer.lora_B["default"]]


def mask(mode):
    differs_and_follows(mode, lambda model, layer: masked(layer))


def masked(layer):
    for module in (layer.lora_A["default"], layer.lora_magnitude_vector["default"]):
        with torch.no_grad():
            nn.utils.prune.random_unstructured(module, "weight", 0.5)
