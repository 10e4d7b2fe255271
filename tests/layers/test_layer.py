"""Every adapted layer against the dense reference: forward, gradients, dropout, several adapters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from covering import pairs
from layer_fixtures import (
    DTYPES,
    KINDS,
    One,
    Truth,
    adapted,
    base_of,
    check,
    dense_base,
    distance,
    dora,
    example,
    expected_warning,
    found_gradients,
    map_with,
    seeded,
    with_two_adapters,
)
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_peft import DoraConfig, reference
from dora_peft.ops.dropout import dropout_mask


@pytest.mark.parametrize(("kind", "dtype", "detach"), pairs(KINDS, DTYPES, [True, False]))
def test_forward_and_gradients(kind, dtype, detach):
    model = adapted(kind, dtype, detach_norm=detach)
    found = check(model, example(model), detach=detach)
    assert {"default.A", "default.B", "default.m"} <= found.keys()
    assert ("x" in found) is not isinstance(base_of(model), nn.Embedding)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    torch.manual_seed(0)
    layer = KINDS[kind]()
    with expected_warning(layer):
        model = get_peft_model(One(copy.deepcopy(layer)), DoraConfig(target_modules=["layer"]))
    x = example(model)
    torch.testing.assert_close(model(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_gradient_differs_from_the_detached_one(kind):
    found = []
    for detach in (True, False):
        model = adapted(kind, detach_norm=detach)
        found.append(check(model, example(model), detach=detach))
    assert distance(found[0]["default.A"], found[1]["default.A"].double()) > 1e-2
    assert distance(found[0]["default.B"], found[1]["default.B"].double()) > 1e-2
    torch.testing.assert_close(found[0]["default.m"], found[1]["default.m"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_adapters_over_a_low_precision_base_are_fp32(kind, dtype):
    model = adapted(kind, dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = check(model, example(model))
    assert {found[f"default.{name}"].dtype for name in "ABm"} == {torch.float32}


@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (2, 0, 12), (12,), (2, 3, 4, 12)])
def test_inputs_of_any_shape(shape):
    model = adapted("linear")
    x = torch.randn(shape, generator=seeded(), requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y.double(), Truth(model, x).y, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "Conv1D"])
def test_inputs_that_need_no_gradient(kind):
    model = adapted(kind)
    found = check(model, example(model, grad=False))
    assert found.keys() == {"default.A", "default.B", "default.m"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach", [True, False])
def test_a_layer_used_twice_in_one_graph(kind, detach):
    model = adapted(kind, torch.float64, detach_norm=detach)
    x = example(model)
    other = x.detach().flip(0).requires_grad_(x.requires_grad)
    y, second = model(x), model(other)
    probe = torch.randn(y.shape, generator=seeded(), dtype=y.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * probe + second.square()).sum(), parameters)
    parts = [
        torch.autograd.grad((model(x) * probe).sum(), parameters),
        torch.autograd.grad(model(other).square().sum(), parameters),
    ]
    for both, one, two in zip(found, *parts, strict=True):
        torch.testing.assert_close(both, one + two)


CONSUMERS = {
    "relu_": lambda y: F.relu_(y),
    "add_": lambda y: y.add_(1),
    "mul_": lambda y: y.mul_(2),
    "relu": nn.ReLU(inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5, inplace=True),
}


@pytest.mark.parametrize(
    ("kind", "consumer", "wrap"),
    pairs(
        ["linear", "linear-no-bias", "Conv1D", "conv2d", "conv2d-no-bias", "embedding"],
        CONSUMERS,
        ["none", "autocast", "reentrant", "non-reentrant", "offload"],
    ),
)
def test_consumers_that_write_in_place(kind, consumer, wrap):
    model = adapted(kind, torch.float32 if wrap == "autocast" else torch.float64)
    x = example(model)
    parameters = [p for p in model.parameters() if p.requires_grad] + [x] * x.requires_grad
    # a reentrant checkpoint has no gradient without an input that needs one
    anchor = torch.zeros((), requires_grad=True, dtype=torch.float64)

    def forward(x, anchor, copied):
        y = model(x) + anchor if copied else model(x)
        return CONSUMERS[consumer](y) + anchor

    def gradients(copied):
        torch.manual_seed(3)
        if wrap == "none":
            y = forward(x, anchor, copied)
        elif wrap == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = forward(x, anchor, copied).float()
        elif wrap == "offload":
            with torch.autograd.graph.save_on_cpu():
                y = forward(x, anchor, copied)
        else:
            y = checkpoint(forward, x, anchor, copied, use_reentrant=wrap == "reentrant")
        for p in parameters:
            p.grad = None
        (y**3).sum().backward()
        return [p.grad for p in parameters]

    for found, expected in zip(gradients(False), gradients(True), strict=True):
        # the magnitude's gradient comes from y, and from z where y was changed
        if wrap == "autocast":
            assert distance(found, expected) < 2**-6
        else:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, detach):
    model = adapted(kind, detach_norm=detach)
    x = example(model)
    truth = Truth(model, x, detach=detach)
    naive = Truth(model, x, dtype=torch.bfloat16, detach=detach)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == base_of(model)(x).dtype
        y = model(x)
    assert distance(y, truth.y) <= 2 * distance(naive.y, truth.y) + 2**-8
    probe = torch.randn(y.shape, generator=seeded()).to(y.dtype)
    expected, rounded = (t.gradients(probe) for t in (truth, naive))
    for name, grad in found_gradients(model, x, y, probe).items():
        assert distance(grad, expected[name]) <= 2 * distance(rounded[name], expected[name]) + 2**-8, name


@pytest.mark.parametrize("detach", [True, False])
def test_autocast_does_not_lower_the_precision_of_the_scale(detach):
    model = adapted("linear", detach_norm=detach)
    expected = dora(model).scale("default", differentiable=True).detach()
    dora(model)._norms.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dora(model).scale("default", differentiable=True)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "reentrant", "mode", "dropout"),
    pairs(["linear", "conv2d", "conv2d-grouped"], [True, False], ["branch", "paper"], [0.0, 0.5]),
)
def test_gradient_checkpointing_changes_nothing(kind, reentrant, mode, dropout):
    model = adapted(kind, torch.float64, lora_dropout=dropout, dropout_mode=mode)
    x = example(model)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(forward):
        torch.manual_seed(3)
        for p in parameters:
            p.grad = None
        forward(x).square().sum().backward()
        return [p.grad for p in parameters]

    found = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for one, two in zip(found, gradients(model), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["branch", "paper"])
@pytest.mark.parametrize("detach", [True, False])
def test_dropout_modes(mode, detach, bias):
    kind = "linear" if bias else "linear-no-bias"
    model = adapted(kind, torch.float64, lora_dropout=0.5, dropout_mode=mode, detach_norm=detach)
    layer, base, x = dora(model), base_of(model), example(model)
    leaves = [x, *layer.factor_parameters("default"), layer.lora_magnitude_vector["default"].weight]
    torch.manual_seed(5)
    found = model(x)
    torch.manual_seed(5)
    if mode == "branch":
        mask, kept = dropout_mask(x.shape, 0.5, x.device)
        dropped = x * mask / kept
    else:
        dropped = F.dropout(x, 0.5)
    expected = reference.dora_linear(
        x,
        base.weight,
        *leaves[1:],
        layer.scaling["default"],
        base.bias,
        dropped=dropped,
        dropout_mode=mode,
        detach_norm=detach,
    )
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, probe), torch.autograd.grad(expected, leaves, probe))
    model.eval()
    torch.testing.assert_close(model(x), Truth(model, x).y)


def test_paper_dropout_is_refused_for_several_active_adapters():
    model = adapted("linear", lora_dropout=0.5, dropout_mode="paper")
    model.add_adapter("other", DoraConfig(target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"'default' uses dropout_mode='paper'.*module 'layer'"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("kind", "order", "training"), pairs(KINDS, [("default", "second"), ("second", "default")], [True, False])
)
def test_active_adapters_compose_in_their_order(kind, order, training):
    model = with_two_adapters(kind).train(training)
    model.base_model.set_adapter(list(order))
    check(model, example(model), adapters=order)


def test_the_order_of_composition_matters():
    model = with_two_adapters("linear")
    x, outputs = example(model), []
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        outputs.append(model(x))
    assert distance(*outputs) > 1e-3


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "conv2d-grouped"])
def test_mixed_batches(kind):
    model = with_two_adapters(kind).eval()
    x = example(model, batch=4)
    names = ["second", "__base__", "default", "second"]
    found = model(x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            expected = base_of(model)(x[i : i + 1])
        else:
            expected = Truth(model, x[i : i + 1], adapters=(name,)).y
        torch.testing.assert_close(found[i : i + 1], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_only_modules(kind):
    model = adapted(kind, torch.float64, target_modules=None, magnitude_only_modules=["layer"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.layer.lora_magnitude_vector.default.weight"
    ]
    x = example(model)
    found = check(model, x)
    assert "default.m" in found
    base = base_of(model)
    bias = getattr(base, "bias", None)
    c = dora(model).lora_magnitude_vector["default"].weight.flatten() / dense_base(base, base.weight).norm(dim=1)
    torch.testing.assert_close(model(x), map_with(base, x, c[:, None] * dense_base(base, base.weight), bias))
    for change in (
        lambda: model.requires_grad_(True),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.enable_adapter_layers(),
    ):
        change()
    model.set_adapter("default")
    assert not any(factor.requires_grad for factor in dora(model).factor_parameters("default"))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_disabled_adapters_leave_the_base(kind, merged):
    model = adapted(kind)
    x = example(model)
    base = copy.deepcopy(base_of(model))
    adapted_output = model(x)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model(x), adapted_output)


def test_a_deleted_adapter_is_gone():
    model = with_two_adapters("linear")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert not any("default" in name for name in model.state_dict())
    assert not any("default" in value for value in vars(dora(model)).values() if isinstance(value, dict))
    model.set_adapter("second")
    check(model, example(model), adapters=("second",))


@pytest.mark.parametrize("r", [17, 500])
def test_a_rank_beyond_the_layer_is_refused_by_name(r):
    with pytest.raises(ValueError, match=rf"r={r} .*'layer'.*10 x 12.*rank_pattern"):
        adapted("linear", r=r)


@pytest.mark.parametrize("rank", [0, -1, 2.5])
def test_a_rank_that_is_not_a_positive_integer_is_refused(rank):
    with pytest.raises(ValueError, match="positive integer"):
        adapted("linear", rank_pattern={"layer": rank})


def test_a_refused_layer_is_left_as_it_was():
    base = One(nn.Linear(12, 10))
    before = base.layer
    with pytest.raises(ValueError, match="'layer'"):
        get_peft_model(base, DoraConfig(r=500, target_modules=["layer"]))
    assert base.layer is before
