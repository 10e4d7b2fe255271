"""The search of the ordinary run, and what it is made of. `scripts/search.py` runs many more examples."""

import consumers
import hypothesis
import pytest
import torch
import torch.nn.functional as F
from models import ConfigSpec, ModelSpec, Net
from operations import OPERATIONS, WEIGHTS, Op
from runner import Case, Report, cases, describe, examine, run, shorten
from world import Disagreement, World, check

# the ordinary road is what is searched
pytestmark = pytest.mark.cached_norms

RARE = {name for name, weight in WEIGHTS.items() if weight < 6}


def test_two_hundred_examples():
    report = Report()

    @hypothesis.settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        # one at a time is shortened soon enough
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def no_disagreement(case):
        examine(case, report)

    no_disagreement()
    assert OPERATIONS.keys() - RARE <= report.operations.keys()
    assert set(consumers.NAMES) == set(report.consumers)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_on_the_simplest_model(name):
    """Where the search fails, this says which operation to begin with."""
    examine(Case(ModelSpec(), ConfigSpec(), (Op(name), Op(name, a=1, b=1), Op(name, a=2, b=2))))


@pytest.mark.parametrize("consumer", consumers.NAMES)
def test_each_consumer(consumer):
    operations = (Op("evaluate_with_gradients", consumer), Op("train_sgd", consumer), Op("train_adamw", consumer))
    examine(Case(ModelSpec("glu"), ConfigSpec(), operations))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_raw_writes_move_no_version_counter(dtype):
    y = torch.randn(3, 4, dtype=dtype)
    before, version = y.clone(), y._version
    consumers.write_raw(y, before * 2)
    assert torch.equal(y, before * 2)
    assert y._version == version


@pytest.mark.parametrize("name", consumers.NAMES)
def test_a_consumer_and_its_pure_twin(name):
    """The same output and gradient, where the output that is consumed belongs to nobody else."""
    leaf, masks = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), []
    found = consumers.APPLY[name](leaf * 1, masks.append)
    expected = consumers.pure(name, leaf * 1, masks[0] if masks else None)
    torch.testing.assert_close(found, expected)
    probe = torch.randn(4, 6, dtype=torch.float64)
    one, other = (torch.autograd.grad((y * probe).sum(), leaf)[0] for y in (found, expected))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["gradient over output", "scribble over output"])
def test_backward_writes_over_the_consumed_tensor(name):
    leaf = torch.randn(4, 6, requires_grad=True)
    y = leaf * 1
    before = y.detach().clone()
    consumers.APPLY[name](y, lambda mask: None).sum().backward()
    assert not torch.equal(y, before)


def test_rotation_leaves_the_first_row_alone():
    y = torch.randn(4, 6)
    before = y.clone()
    consumers.APPLY["rotate in place"](y, lambda mask: None)
    assert torch.equal(y[0], before[0])
    assert torch.equal(y[:, ::2], before[:, ::2])
    assert (y[1:, 1::2] != before[1:, 1::2]).all()


def test_a_recomputed_pass_keeps_its_own_masks():
    net = Net("one", {"a": torch.nn.Linear(6, 8)})
    net.consumer, net.checkpointing = "relu_", "non-reentrant"
    x = torch.randn(3, 6, requires_grad=True)
    net.masks = first = {}
    y = net(x)
    net.masks = second = {}
    y.sum().backward()
    assert set(first) == {0}
    assert not second


def test_what_is_off_by_more_than_allowed_is_a_disagreement():
    value = torch.ones(4)
    check({"x": value * 1.01}, {"x": value}, {"x": 0.02}, "here")
    with pytest.raises(Disagreement, match="here: x off"):
        check({"x": value * 1.03}, {"x": value}, {"x": 0.02}, "here")
    with pytest.raises(Disagreement, match="here: x off"):
        check({"x": value * float("nan")}, {"x": value}, {"x": 0.02}, "here")
    with pytest.raises(Disagreement, match="here: m missing"):
        check({}, {"a.p.m": value}, {"a.p.m": 0.02}, "here")


def test_a_small_gradient_is_measured_against_the_others():
    large, small = torch.ones(4), torch.full((4,), 1e-9)
    check({"x": large, "a.p.A": small * 2}, {"x": large, "a.p.A": small}, {"x": 1e-4, "a.p.A": 1e-4}, "here")


def test_low_precision_is_allowed_what_plain_implementations_err():
    world = World(ModelSpec(dtype="bfloat16"), ConfigSpec())
    world.start()
    _, run_ = world.forward(world.input())
    _, allowed = world.truth([run_])
    assert 2**-7 < min(allowed.values()) <= max(allowed.values()) < 0.2


def test_a_disagreement_is_shortened_and_described():
    def broken(world, op):
        if op.a > 3:
            raise Disagreement("broken")

    case = Case(ModelSpec("glu", seed=4), ConfigSpec(r=3), (Op("evaluate"), Op("broken", "relu_", 7, 2)))
    OPERATIONS["broken"] = broken
    try:
        shortest = shorten(case, "broken")
    finally:
        del OPERATIONS["broken"]
    assert shortest == Case(ModelSpec(), ConfigSpec(), (Op("broken", a=7),))
    assert describe(shortest) == "model() adapter(): broken(a=7)"


def test_run_counts(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "evaluate", lambda world, op: F.silu(torch.ones(1)))
    others = tuple(name for name in OPERATIONS if name != "evaluate")
    report = run(5, 0, without=others)
    assert report.examples == 5
    assert report.operations["evaluate"] >= 10
    assert not report.kinds
