"""The cached norm is right after everything that changes it."""

import copy
import io

import pytest
import torch
from norm_fixtures import CHANGES, TwoLayers, edit_A, edit_B, edit_base, train_step, true, up, used
from peft import get_peft_model
from torch import nn

import dora_peft
from dora_peft import DoraConfig, reference
from dora_peft.norms import Norm, state, up_to_date


class ThroughData(torch.optim.Optimizer):
    """Writes past the version counters, as bitsandbytes' and DeepSpeed's optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.1)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd-foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0, fused=True),
    "through .data": ThroughData,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_refreshed_after(change, model):
    before = used(up(model))
    torch.testing.assert_close(before, true(up(model)))
    change(model)
    assert not torch.allclose(true(up(model)), before, rtol=1e-3)
    torch.testing.assert_close(used(up(model)), true(up(model)))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_refreshed_after_an_optimizer_step(kind, model):
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        before = used(up(model))
        train_step(model, optimizer)
        assert not torch.allclose(true(up(model)), before, rtol=1e-3)
        torch.testing.assert_close(used(up(model)), true(up(model)))


def test_set_scale_is_relative_to_the_initial_scaling(model):
    layer = up(model)
    initial = layer.scaling["default"]
    for factor in (3, 0.5, 1):
        layer.set_scale("default", factor)
        assert layer.scaling["default"] == factor * initial
    layer.scale_layer(4)
    layer.scale_layer(2)
    assert layer.scaling["default"] == 8 * initial
    layer.unscale_layer(2)
    assert layer.scaling["default"] == 4 * initial
    layer.unscale_layer()
    assert layer.scaling["default"] == initial
    torch.testing.assert_close(used(layer), true(layer))


def test_follows_the_dtype(model):
    single = used(up(model))
    model.double()
    double = used(up(model))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, true(up(model)), rtol=1e-12, atol=0)
    model.float()
    torch.testing.assert_close(used(up(model)), single)
    model.bfloat16()
    rounded = used(up(model))
    assert rounded.dtype == torch.float32
    lora_A, lora_B = (up(model).__getattr__(name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    expected = reference.weight_norm(up(model).get_base_layer().weight.double(), lora_A, lora_B, 5 / 3)
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=0)


def test_follows_the_device(model):
    before = used(up(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    torch.testing.assert_close(used(up(model)), true(up(model)))
    assert not torch.allclose(used(up(model)), before, rtol=1e-3)


@pytest.mark.parametrize("which", ["lora_A", "base"])
def test_sees_another_parameter_at_the_same_address(which, model):
    """What the allocator gives to a new tensor after the old one was freed, as in `.to("meta")` and `to_empty`."""
    layer = up(model)
    owner = layer.get_base_layer() if which == "base" else layer.lora_A["default"]
    memory = owner.weight.detach().clone().numpy()
    owner.weight = nn.Parameter(torch.from_numpy(memory))
    used(layer)
    memory *= 2
    owner.weight = nn.Parameter(torch.from_numpy(memory))
    torch.testing.assert_close(used(layer), true(layer))


def test_is_that_of_the_unmerged_weight_while_merged(model):
    before = used(up(model))
    model.merge_adapter()
    assert torch.equal(used(up(model)), before)
    model.unmerge_adapter()
    assert torch.equal(used(up(model)), before)
    edit_base(model)
    torch.testing.assert_close(used(up(model)), true(up(model)))


def test_belongs_to_one_adapter(model):
    model.add_adapter("other", DoraConfig(target_modules=["up"], r=2, init_lora_weights=False))
    layer = up(model)
    for adapter in ("default", "other"):
        torch.testing.assert_close(used(layer, adapter), true(layer, adapter))
    assert not torch.allclose(used(layer, "default"), used(layer, "other"), rtol=1e-3)


def test_of_a_copy_is_its_own(model):
    twin = copy.deepcopy(model)
    edit_A(twin)
    torch.testing.assert_close(used(up(twin)), true(up(twin)))
    torch.testing.assert_close(used(up(model)), true(up(model)))
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(used(up(loaded)), true(up(twin)))
    edit_B(loaded)
    torch.testing.assert_close(used(up(loaded)), true(up(loaded)))


class Wide(nn.Module):
    """One layer with more elements than are compared in full."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(96, 80, bias=False)

    def forward(self, x):
        return self.up(x)


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return get_peft_model(Wide(), DoraConfig(r=3, lora_alpha=5, target_modules=["up"], init_lora_weights=False))


def write_one_element(model):
    """Of the base weight, past its version counter."""
    up(model).get_base_layer().weight.data[3, 1] += 100


@pytest.mark.cached_norms
@pytest.mark.implementation("torch")
def test_refresh_after_a_write_to_a_part_of_the_base_through_data(wide):
    before = used(up(wide))
    write_one_element(wide)
    # what makes the call necessary
    assert torch.equal(used(up(wide)), before)
    dora_peft.refresh(wide)
    assert not torch.allclose(used(up(wide)), before, rtol=1e-3)
    torch.testing.assert_close(used(up(wide)), true(up(wide)))


def test_checking_finds_a_stale_norm_and_names_the_module(wide):
    x = torch.randn(2, 96)
    wide(x)
    write_one_element(wide)
    with (
        dora_peft.checking(),
        pytest.raises(RuntimeError, match=r"module 'up', adapter 'default'.*dora_peft\.refresh"),
    ):
        wide(x)
    dora_peft.refresh(wide)
    with dora_peft.checking():
        wide(x)


@pytest.mark.cached_norms
def test_checking_ends_with_its_block(model, monkeypatch):
    counted = []
    original = state._check
    monkeypatch.setattr(state, "_check", lambda *args: (counted.append(args), original(*args))[1])
    with dora_peft.checking():
        with dora_peft.checking():
            model(torch.randn(2, 6))
        counted.clear()
        model(torch.randn(2, 6))
        assert counted
    counted.clear()
    model(torch.randn(2, 6))
    assert not counted


@pytest.mark.parametrize("detach", [True, False])
def test_training_after_inference_mode(detach, model):
    up(model).detach_norm["default"] = detach
    # so that the refresh happens in inference mode
    edit_A(model)
    with torch.inference_mode():
        model(torch.randn(2, 6))
    model(torch.randn(2, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_made_in_inference_mode_is_never_stale():
    with torch.inference_mode():
        config = DoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
        model = get_peft_model(TwoLayers(), config).eval()
        x = torch.randn(2, 6)
        model(x)
        up(model).lora_A["default"].weight.mul_(2)
        torch.testing.assert_close(used(up(model)), true(up(model)))


def zero_row_model(**options):
    torch.manual_seed(0)
    base = TwoLayers()
    with torch.no_grad():
        base.up.weight[[2, 5]] = 0
    return get_peft_model(base, DoraConfig(r=3, target_modules=["up"], **options))


def test_magnitudes_of_zero_rows_follow_their_norm():
    model = zero_row_model()
    layer = up(model)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert up_to_date(layer, "default").tied.nonzero().flatten().tolist() == [2, 5]
    assert (magnitude[[2, 5]] == 0).all()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        train_step(model, optimizer)
        model(torch.randn(2, 6))
        assert (magnitude[[2, 5]] > 0).all()
        torch.testing.assert_close(magnitude[[2, 5]], true(layer)[[2, 5]])
    # the others are free
    assert not torch.allclose(magnitude, true(layer), rtol=1e-3)


def test_a_refresh_between_backward_and_step_keeps_the_graph_valid():
    """Writing m on tied rows must not count as an in-place edit of a tensor that autograd saved."""
    model = zero_row_model()
    loss = model(torch.randn(2, 6)).square().sum()
    dora_peft.refresh(model)
    with torch.no_grad():
        model(torch.randn(2, 6))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_rows_are_tied_again_after_loading_where_magnitude_and_norm_agree():
    model = zero_row_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_step(model, optimizer)
    up(model).scale("default")
    layer = up(model)
    # what loading a checkpoint leaves
    layer._norms["default"] = Norm()
    assert up_to_date(layer, "default").tied.nonzero().flatten().tolist() == [2, 5]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[5] *= 2
    layer._norms["default"] = Norm()
    assert up_to_date(layer, "default").tied.nonzero().flatten().tolist() == [2]


@pytest.mark.cached_norms
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "param"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Unsupported layer type")
def test_a_base_weight_that_each_forward_pass_computes(wrap, kind):
    """Its parts may have changed since the last one; v is that of the weight that this pass multiplies by."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv1d(6, 5, 1)
    base = nn.Sequential()
    base.add_module("layer", wrap(layer))
    model = get_peft_model(base, DoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(3, 6) if kind == "linear" else torch.randn(3, 6, 4)
    model(x)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora" not in name and parameter.shape[0] == 5 and name != "bias":
                parameter.data.copy_(torch.rand_like(parameter) + 0.5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(x)
    with dora_peft.implementation("reference"):
        torch.testing.assert_close(found, model(x))
