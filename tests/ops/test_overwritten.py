"""The output is changed in place before the backward pass, or the graph is passed over twice."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from covering import pairs
from linear_fixtures import (
    BF16,
    FLOOR,
    FORMS,
    FP32,
    FP64,
    Problem,
    Products,
    assert_equal_gradients,
    backward,
    check,
    gradients,
    identity_hooks,
    randn,
)
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from dora_peft.ops import overwritten, torch_names
from dora_peft.ops.kept_output import KeptOutput
from dora_peft.ops.overwritten import Outputs
from dora_peft.ops.products import composed_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def overwrite(y):
    y[..., :3] = 2.0
    return y


def add_flat(y):
    y.view(-1).add_(3.0)
    return y


def change_unseen(y):
    with torch.no_grad():
        y.mul_(-2.0)
    return y


CONSUMERS = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(0.5),
    "overwrite": overwrite,
    "add_flat": add_flat,
    "change_unseen": change_unseen,
}
READERS = {"relu": torch.relu, "clone": torch.clone, "mul": lambda y: y * 0.5}


def under(context):
    def apply(function, x):
        with context():
            return function(x)

    return apply


def half(function, x):
    with torch.autocast("cpu", dtype=BF16):
        return function(x)


def recomputed(function, x):
    return checkpoint(function, x, use_reentrant=False)


SURROUNDINGS = {
    "plain": under(nullcontext),
    "offloaded": under(save_on_cpu),
    "hooks": under(identity_hooks),
    "checkpoint": recomputed,
    "reentrant checkpoint": lambda function, x: checkpoint(function, x, use_reentrant=True),
    "autocast": half,
    "checkpoint under autocast": lambda function, x: half(lambda x: recomputed(function, x), x),
}


def small_bias(*shape):
    """In bf16 as well, no row of these few tokens is drowned by its bias."""
    problem = Problem(*shape, dtype=FP32)
    return problem.set(bias=0.01 * problem.leaves["bias"])


def gradients_after(problem, form, consumer, surroundings, inside):
    """With the consumer within the surroundings of the layer, or after them."""

    def layer(x):
        return problem.y(form, x=x)

    x, apply = problem.leaves["x"], SURROUNDINGS[surroundings]
    out = apply(lambda x: consumer(layer(x)), x) if inside else consumer(apply(layer, x))
    problem.products.clear()
    return backward(problem, (out * randn(*out.shape, seed=9).to(out.dtype)).sum())


@pytest.mark.parametrize(
    ("consumer", "surroundings", "inside", "form"), pairs(CONSUMERS, SURROUNDINGS, [True, False], FORMS)
)
def test_the_next_operation_may_change_the_output(consumer, surroundings, inside, form):
    change = CONSUMERS[consumer]
    for shape in [(4,), (2, 3)]:
        problem = small_bias(*shape)
        found = gradients_after(problem, form, change, surroundings, inside)
        if form == "base_out":
            # computed again, once and for all rows; what is after a reentrant checkpoint never sees the layer's own y
            own = inside or surroundings != "reentrant checkpoint"
            assert problem.products == [None] * own
        expected = gradients_after(problem, form, lambda y: change(y.clone()), surroundings, inside)
        assert not problem.products
        assert_equal_gradients(found, expected, 2 * FLOOR[BF16 if "autocast" in surroundings else FP32])


@pytest.mark.parametrize(("reader", "surroundings", "inside"), pairs(READERS, SURROUNDINGS, [True, False]))
def test_an_unchanged_output_is_not_computed_again(reader, surroundings, inside):
    problem = small_bias(2, 3)
    found = gradients_after(problem, "base_out", READERS[reader], surroundings, inside)
    assert not problem.products
    expected = gradients_after(problem, "weight", READERS[reader], surroundings, inside)
    assert_equal_gradients(found, expected, 2 * FLOOR[BF16 if "autocast" in surroundings else FP32])


@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.implementation("torch")
def test_products_with_the_weight(n, context):
    """One forward, one for dx, and one more where y was changed and m is trained."""
    for change, trains_m in product([False, True], [True, False]):
        problem = Problem(n)
        assert (n >= composed_rows(problem.weight)) == (n == 20)
        problem.only("x", "A", "B", *["m"] * trains_m)
        forward, back = Products(problem.weight), Products(problem.weight)
        with context(), forward:
            y = problem.y()
        if change:
            y.mul_(2.0)
        with back:
            y.sum().backward()
        expected = 1 + (change and trains_m)
        assert (forward.count, back.count) == (1, expected)


def test_a_change_through_an_alias_is_seen():
    problem = Problem(6)
    y = problem.y()
    loss = (y * 2).sum()
    y.detach().zero_()
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, torch.full((6, 7), 2.0))
    assert_equal_gradients(backward(problem, loss), expected, FLOOR[FP64])


@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_two_passes_over_a_graph(form, change, context):
    problem = Problem(6)
    with context():
        y = problem.y(form)
        out = y.mul_(2.0) if change else y * 2.0
    del y
    probe = randn(6, 7, seed=9)
    truth, leaves = problem.truth()
    expected = gradients(2 * truth, leaves, probe)
    for last in (False, False, True):
        found = problem.gradients(out, probe, retain_graph=not last)
        assert_equal_gradients(found, expected, FLOOR[FP64])
    with pytest.raises(RuntimeError, match="second time"):
        problem.gradients(out, probe)


@pytest.mark.parametrize("context", [nullcontext, identity_hooks])
def test_a_second_pass_over_a_freed_graph_raises(context):
    """The error is the function's own: no other node of this graph saves anything."""
    problem = Problem(6)
    with context():
        y = problem.y()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: y.sum()])
@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_raises(form, loss):
    problem = Problem(6)
    # whose own branch is twice differentiable, so x would have a derivative without the rest
    if form == "base_out":
        problem.only("A", "B", "m")
    with pytest.raises(RuntimeError, match=r'create_graph=True.*implementation\("reference"\)'):
        problem.gradients(loss(problem.y(form)), torch.ones(()), create_graph=True)


def hooks_are_active():
    return KeptOutput(torch.ones(1, 1), Outputs()).through_hooks


def test_saved_tensor_hooks_are_noticed():
    seen = []
    assert not hooks_are_active()
    for context in (save_on_cpu, identity_hooks):
        with context():
            assert hooks_are_active()
        assert not hooks_are_active()
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: (seen.append(hooks_are_active()), x * x)[1], x, use_reentrant=False)
    assert seen == [True]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
def test_a_torch_that_does_not_tell_of_hooks(context, form, monkeypatch):
    """Hooks are assumed then. Results are the same, and a change that no hook hides raises torch's own error."""
    monkeypatch.setattr(torch_names, "top_hooks", None)
    assert hooks_are_active()
    problem = Problem(2, 3)
    with context():
        y = problem.y(form)
    check(problem, form, y=y)
    with context():
        y = problem.y(form).mul_(2.0)
    if context is nullcontext:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        truth, leaves = problem.truth()
        probe = randn(2, 3, 7, seed=9)
        assert_equal_gradients(problem.gradients(y, probe), gradients(2 * truth, leaves, probe), FLOOR[FP64])


def test_a_device_is_asked_in_the_first_backward_passes_and_then_in_some():
    """To be told what it found costs the host more than to launch the comparison."""
    outputs = Outputs("one")
    asked = [number for number in range(1, 50) if outputs.asks()]
    assert asked == [1, 2, 3, 4, 16, 32, 48]


@pytest.mark.parametrize("capturing", [False, True])
def test_a_device_is_not_asked_during_a_capture(capturing, monkeypatch):
    """CUDA refuses, and gives the capture up."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    event = SimpleNamespace(query=lambda: asked.append(1) or True)
    assert overwritten._Later(torch.zeros(1), event).has_arrived() is not capturing
    assert len(asked) == (not capturing)
