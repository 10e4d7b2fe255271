"""v of all layers of a model in two launches at the start of its forward pass; all else is checked in the layer."""

import platform

import pytest
import torch
from norm_fixtures import CHANGES, TwoLayers, true, up, used
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_peft
from dora_peft import DoraConfig
from dora_peft.norms import grouped

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels import grouped_norm, norm

pytestmark = [pytest.mark.cached_norms, pytest.mark.implementation("triton")]
KERNELS = {
    "check all": (grouped_norm, "_check_all"),
    "refresh all": (grouped_norm, "_refresh_all"),
    "check": (norm, "_digest"),
    "refresh": (norm, "_checked_norm"),
    "compute": (norm, "_norm"),
}


class Recorded:
    """A kernel that writes its name down at each launch."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels of the norm, one for each launch."""
    found = []
    for name, (module, attribute) in KERNELS.items():
        monkeypatch.setattr(module, attribute, Recorded(getattr(module, attribute), name, found))
    return found


class Deep(nn.Module):
    def __init__(self, depth, dtype=torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, dtype=dtype) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adapted(base, r=3):
    for number, parameter in enumerate(base.parameters()):
        torch.manual_seed(number)
        nn.init.normal_(parameter, std=0.3)
    return get_peft_model(base, DoraConfig(r=r, lora_alpha=5, target_modules="all-linear", init_lora_weights=False))


def two_layers():
    return adapted(TwoLayers())


def layers(model):
    return [m for m in model.modules() if isinstance(m, dora_peft.DoraLayer)]


def counts(model):
    """How often a device has computed each v."""
    return [int(layer._norms["default"].device.memory.known[4]) for layer in layers(model)]


def step(model, x):
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_two_launches_whatever_the_number_of_layers(depth, dtype, launches):
    model, x = adapted(Deep(depth, dtype)), torch.randn(4, 16, dtype=dtype)
    # the tables are made of what the layers found by themselves
    step(model, x)
    assert "check all" not in launches
    for number in range(3):
        launches.clear()
        step(model, x)
        assert launches == ["check all", "refresh all"]
        assert counts(model) == [number + 2] * depth
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                launches.clear()
                model(x)
                assert launches == ["check all", "refresh all"]
    # the last step, seen by the first evaluation
    assert counts(model) == [5] * depth


def test_equal_to_what_the_layers_find_by_themselves(launches):
    models = [adapted(Deep(3)) for _ in range(2)]
    grouped.scatter(models[1].base_model.model)
    for _ in range(4):
        x = torch.randn(4, 16)
        outs = [model(x) for model in models]
        assert torch.equal(*outs)
        for out in outs:
            out.square().sum().backward()
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            if a.grad is not None:
                assert torch.equal(a.grad, b.grad)
                with torch.no_grad():
                    a -= 0.1 * a.grad
                    b -= 0.1 * b.grad
                a.grad = b.grad = None
    assert launches.count("check all") == 3
    assert launches.count("refresh") == 3 + 4 * 3
    assert counts(models[0]) == counts(models[1]) == [4] * 3


def test_a_change_of_one_layer_refreshes_that_layer_alone():
    model, x = adapted(Deep(3)), torch.randn(4, 16)
    for _ in range(2):
        model(x)
    assert counts(model) == [1, 1, 1]
    layers(model)[1].lora_B["default"].weight.data[0] += 1
    model(x)
    assert counts(model) == [1, 2, 1]
    torch.testing.assert_close(used(layers(model)[1]), true(layers(model)[1]))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_between_passes_is_seen(change):
    model, x = two_layers(), torch.randn(3, 6)
    for _ in range(3):
        model(x)
    change(model)
    with dora_peft.checking():
        for _ in range(3):
            model(x)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_amid_a_pass_that_the_host_can_see(change):
    """Between the start of the model's pass and the layer."""

    class Changing(TwoLayers):
        before = None

        def forward(self, x):
            if self.before is not None:
                self.before()
            return super().forward(x)

    model, x = adapted(Changing()), torch.randn(3, 6)
    for _ in range(3):
        model(x)
    model.base_model.model.before = lambda: change(model)
    with dora_peft.checking():
        model(x)


@pytest.mark.parametrize("where", ["layer", "base layer", "global", "the model's own, after ours"])
def test_hooks_of_others_may_write_past_the_version_counter(where, launches):
    model, x = two_layers(), torch.randn(3, 6)
    for _ in range(2):
        model(x)

    def write(*_):
        up(model).lora_B["default"].weight.data.mul_(2)

    register = {
        "layer": up(model).register_forward_pre_hook,
        "base layer": up(model).get_base_layer().register_forward_pre_hook,
        "global": nn.modules.module.register_module_forward_pre_hook,
        "the model's own, after ours": model.base_model.model.register_forward_pre_hook,
    }
    handle = register[where](write)
    launches.clear()
    try:
        with dora_peft.checking():
            model(x)
    finally:
        handle.remove()
    assert "check all" not in launches
    launches.clear()
    model(x)
    assert launches == ["check all", "refresh all"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_a_backward_pass_checks_by_itself(reentrant, launches):
    class Checkpointed(Deep):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    model, x = adapted(Checkpointed(3)), torch.randn(4, 16, requires_grad=True)
    model(x).sum().backward()
    before = counts(model)
    launches.clear()
    out = model(x)
    assert launches == ["check all", "refresh all"]
    launches.clear()
    out.sum().backward()
    assert launches == ["check", "refresh"] * 3
    assert counts(model) == before


def test_nothing_outlives_its_pass(launches):
    class Failing(TwoLayers):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("in the middle")
            return self.up(x)

    model, x = adapted(Failing()), torch.randn(3, 6)
    for _ in range(2):
        model(x)
    assert not grouped._here.passes
    model.base_model.model.fails = True
    launches.clear()
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    assert launches == ["check all", "refresh all"]
    assert not grouped._here.passes
    up(model)(x)
    assert launches[2:] == ["check", "refresh"]


def test_the_second_call_of_a_layer_checks_by_itself(launches):
    class Twice(TwoLayers):
        def forward(self, x):
            first = self.up(x)
            up_weight.data.mul_(2)
            return first + self.up(x)

    model, x = adapted(Twice()), torch.randn(3, 6)
    up_weight = up(model).lora_B["default"].weight
    model(x)
    launches.clear()
    with dora_peft.checking():
        model(x)
    assert launches.count("check all") == launches.count("refresh") == 1


def test_a_model_that_calls_itself(launches):
    class Recursive(TwoLayers):
        def forward(self, x, again=True):
            if again:
                self(x, again=False)
                up(model).lora_B["default"].weight.data.mul_(2)
            return super().forward(x)

    model, x = adapted(Recursive()), torch.randn(3, 6)
    for _ in range(2):
        with dora_peft.checking():
            model(x)
    assert not grouped._here.passes


def test_a_graph_keeps_the_v_of_its_own_pass():
    """Two forward passes with a step in between, then both backward passes."""
    model, x = adapted(Deep(2)), torch.randn(4, 16)
    for _ in range(2):
        model(x)
    grads = []
    for other in (False, True):
        out = model(x)
        if other:
            saved = [layer.lora_B["default"].weight.detach().clone() for layer in layers(model)]
            for layer in layers(model):
                layer.lora_B["default"].weight.data.mul_(3)
            model(x)
            for layer, kept in zip(layers(model), saved, strict=True):
                layer.lora_B["default"].weight.data.copy_(kept)
        grads.append(torch.autograd.grad(out.sum(), layers(model)[0].lora_magnitude_vector["default"].weight)[0])
    assert torch.equal(*grads)


def test_no_table_is_made_again_for_an_optimizer_step(monkeypatch):
    made, original = [], grouped_norm.Group.__init__
    monkeypatch.setattr(
        grouped_norm.Group, "__init__", lambda self, entries: (made.append(1), original(self, entries))[1]
    )
    model, x = adapted(Deep(3)), torch.randn(4, 16)
    for _ in range(5):
        step(model, x)
    assert len(made) == 1


def test_tables_that_serve_one_pass_each_are_given_up(launches):
    model, x, kept = two_layers(), torch.randn(3, 6), []
    p = up(model).lora_B["default"].weight
    for number in range(2 * grouped._PATIENCE + 4):
        launches.clear()
        # held, so that no address comes twice
        kept.append(p.data)
        p.data = p.data.clone()
        with dora_peft.checking():
            model(x)
        assert ("check all" in launches) == (0 < number <= grouped._PATIENCE + 1)


def test_loading_and_unloading_leaves_no_hook():
    model = two_layers()
    base = model.base_model.model
    assert grouped._begin in base._forward_pre_hooks.values()
    model.add_adapter("other", DoraConfig(r=2, target_modules=["up"]))
    assert len(base._forward_pre_hooks) == len(base._forward_hooks) == 1
    base = model.merge_and_unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert not base._forward_hooks_always_called


def test_two_adapters_are_checked_in_the_layer(launches):
    model, x = two_layers(), torch.randn(3, 6)
    model.add_adapter("other", DoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    for _ in range(2):
        model(x)
    model.base_model.set_adapter(["default", "other"])
    launches.clear()
    with dora_peft.checking():
        model(x)
    assert "check all" not in launches
    model.base_model.set_adapter("other")
    for _ in range(2):
        launches.clear()
        with dora_peft.checking():
            model(x)
    # beside those of the test of the check itself
    assert [name for name in launches if name != "compute"] == ["check all", "refresh all"]


@pytest.mark.implementation("torch")
def test_without_kernels_nothing_is_gathered(launches):
    model, x = two_layers(), torch.randn(3, 6)
    for _ in range(3):
        model(x)
    assert not launches
