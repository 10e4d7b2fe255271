"""Merging is right, or refused before anything has been touched, over weights that are not the layer's alone."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dora_peft import DoraConfig, DoraLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm`? is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


COMPUTED = {
    "weight_norm": nn.utils.weight_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrize": parametrized,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}
KINDS = {"linear": lambda: nn.Linear(8, 8), "conv1d": lambda: nn.Conv1d(8, 8, 1)}


class Net(nn.Module):
    """The plain layer comes first, so that a refusal halfway would have merged it."""

    def __init__(self, kind, wrap):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), wrap(KINDS[kind]())
        self.conv = kind == "conv1d"

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x[..., None])[..., 0] if self.conv else self.second(x)


def adapt(net, *targets):
    model = get_peft_model(net, DoraConfig(r=2, lora_alpha=4, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


WAYS = {
    "merge_adapter": lambda model, layer: model.merge_adapter(),
    "offload_original": lambda model, layer: model.merge_adapter(offload_original=True),
    "safe_merge": lambda model, layer: model.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda model, layer: model.merge_and_unload(),
    "merge_and_unload safely": lambda model, layer: model.merge_and_unload(safe_merge=True),
    "layer.merge": lambda model, layer: layer.merge(),
    "layer.merge safely": lambda model, layer: layer.merge(safe_merge=True),
}


def refused(model, layer, way, match):
    x = torch.randn(5, 8)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with torch.no_grad():
        before = model(x)
        with pytest.raises(NotImplementedError, match=match):
            WAYS[way](model, layer)
        assert not any(module.merged for module in model.modules() if isinstance(module, DoraLayer))
        assert dict(model.named_modules()) == modules
        now = model.state_dict()
        assert all(torch.equal(value, now[key]) for key, value in state.items())
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", COMPUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_is_refused_by_name(kind, wrap, way):
    torch.manual_seed(0)
    model = adapt(Net(kind, COMPUTED[wrap]), "first", "second")
    refused(model, model.base_model.model.second, way, r"module 'second' .*computed from others.*unmerged")


def test_the_cure_that_the_error_names():
    net = Net("linear", parametrizations.weight_norm)
    parametrize.remove_parametrizations(net.second, "weight")
    model = adapt(net, "second")
    x = torch.randn(5, 8)
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before)


class Twice(nn.Module):
    """One module object under two names; `inner` hides the second one deeper."""

    def __init__(self, where):
        super().__init__()
        self.first, self.a = nn.Linear(8, 8), nn.Linear(8, 8)
        self.where = where
        if where == "sibling":
            self.b = self.a
        elif where == "list":
            self.b = nn.ModuleList([self.a])
        else:
            self.b = nn.Sequential(nn.Tanh(), self.a)

    def forward(self, x):
        x = torch.tanh(self.a(self.first(x)))
        return self.b[0](x) if self.where == "list" else self.b(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["sibling", "list", "sequence"])
def test_a_module_under_two_names_is_refused_by_both(where, way):
    torch.manual_seed(0)
    model = adapt(Twice(where), "first", "a")
    names = {"sibling": "b", "list": "b.0", "sequence": "b.1"}
    refused(model, model.base_model.model.a, way, rf"module 'a' .*as {names[where]}, without the adapter")


def test_a_name_that_is_added_later_is_seen():
    model = adapt(Twice("sibling"), "first", "a")
    model.base_model.model.b = copy.deepcopy(model.base_model.model.a.base_layer)
    model.merge_adapter()
    model.unmerge_adapter()
    model.base_model.model.b = model.base_model.model.a.base_layer
    refused(model, None, "merge_adapter", "module 'a'")


def test_other_adapters_and_modules_may_still_be_merged():
    """Only what would be written has to be writable."""
    model = adapt(Twice("sibling"), "a")
    model.add_adapter("other", DoraConfig(r=2, target_modules=["first"]))
    model.merge_adapter(adapter_names=["other"])
    assert model.base_model.model.first.merged
    assert not model.base_model.model.a.merged


@pytest.mark.parametrize("way", ["merge_adapter", "offload_original", "merge_and_unload"])
def test_an_adapter_under_two_names_merges(way):
    """Both names lead through it, so that the merged weight is right for both, and nothing is untied."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = adapt(nn.Sequential(net, net), "0.0")
    x = torch.randn(5, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model(x)
        merged = WAYS[way](model, None) or model
        torch.testing.assert_close(merged(x), before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("way", ["merge_adapter", "offload_original", "safe_merge", "merge_and_unload"])
def test_the_warning_about_a_shared_weight_is_true(way):
    torch.manual_seed(0)
    model = adapt(Tied(), "a", "c")
    x = torch.randn(5, 8)
    net = model.base_model.model
    weight, address = net.b.weight, net.b.weight.data_ptr()
    with torch.no_grad():
        before = model(x)
        with pytest.warns(UserWarning, match="unties module 'a'") as caught:
            merged = WAYS[way](model, None) or model
        assert len(caught) == 1
        said = str(caught[0].message)
        torch.testing.assert_close(merged(x), before)
        assert net.b.weight is weight
        assert net.b.weight.data_ptr() == address
        a = net.a.base_layer if isinstance(net.a, DoraLayer) else net.a
        assert a.weight is not weight
        assert ("ties them again" in said) == (way != "merge_and_unload")
        if way != "merge_and_unload":
            model.unmerge_adapter()
            assert net.a.base_layer.weight is net.b.weight


def test_no_warning_where_the_shared_weight_is_not_written():
    model = adapt(Tied(), "a")
    model.add_adapter("other", DoraConfig(r=2, target_modules=["c"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(adapter_names=["other"])


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_a_merge_that_fails_halfway_is_taken_back():
    model = adapt(Tied(), "b", "c")
    model.add_adapter("other", DoraConfig(r=2, target_modules=["b", "c"]))
    net = model.base_model.model
    with pytest.warns(UserWarning, match="unties"):
        model.merge_adapter(adapter_names=["default"])
    merged = net.b.base_layer.weight.clone()
    with torch.no_grad():
        net.c.lora_A["other"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected.*module 'c'"):
        model.merge_adapter(adapter_names=["other"], safe_merge=True)
    assert net.b.merged_adapters == net.c.merged_adapters == ["default"]
    assert torch.equal(net.b.base_layer.weight, merged)


def test_a_layer_that_cannot_be_merged_leaves_the_others():
    net = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1, groups=2))
    model = get_peft_model(net, DoraConfig(r=2, target_modules=["0", "1"])).eval()
    with pytest.raises(NotImplementedError, match="module '1'"):
        model.merge_adapter()
    assert not net[0].merged
