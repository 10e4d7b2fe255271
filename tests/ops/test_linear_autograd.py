"""The gradient of m, also if the output does not determine it."""

import itertools

import pytest
import torch
from linear_fixtures import BF16, FORMS, FP16, FP32, FP64, ROUNDING, Problem, S, check, distance, gradients, randn

from dora_peft.ops import linear_parts as parts

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def magnitude_errors(problem, probe, gradient):
    """Of dm [out] per row, in units of sqrt(sum_n (g z)^2): where each term has a relative error e at random, e."""
    m = problem.leaves["m"].detach().double()
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, probe)["m"]
    A, B = (problem.leaves[name].detach().double() for name in "AB")
    x = problem.leaves["x"].detach().double()
    z = x @ (problem.weight.double() + S * B @ A).T / problem.norm.double()
    assert m.shape == gradient.shape == expected.shape
    return (gradient.double() - expected).abs() / (probe.double() * z).square().sum(0).sqrt()


def plain_magnitude_gradient(problem, y, probe):
    """dm from y alone, which is exact in exact arithmetic."""
    _, _, _, c, bias = problem.parts()
    y = y.to(problem.wide) if bias is None else y.to(problem.wide) - bias
    return ((probe * y).sum(0) / c / problem.norm).detach()


def hard_problem(dtype, *, c=None, ratio=None, seed=0):
    """Every other row is hard: c as given, or a bias `ratio` times the size of the rest."""
    problem = Problem(300, width=24, out=12, dtype=dtype, bias=ratio is not None, seed=seed)
    hard = torch.arange(12) % 2 == 1
    if c is not None:
        problem.set(m=torch.where(hard, c * problem.norm, problem.leaves["m"]))
    if ratio is not None:
        without, bias = problem.y().detach().double() - problem.leaves["bias"].double(), problem.leaves["bias"]
        size = without.square().mean(0).sqrt()
        problem.set(bias=torch.where(hard, ratio * size * bias.sign(), 0.1 * size))
    return problem, hard


# Digits of z that may be lost before it is computed again: 2 binary ones in half precision; in wider types 3 decimal
# ones, and y is rounded twice there.
GIVEN_UP = {FP64: 2000, FP32: 2000, BF16: 4, FP16: 4}


def assert_good(errors, problem, probe, hard):
    """At hard and at other rows, each at most twice the eager path's, which keeps z, and the digits given up."""
    eager = magnitude_errors(problem, probe, problem.gradients(problem.eager(), probe)["m"])
    floor = GIVEN_UP[problem.weight.dtype] * ROUNDING[problem.weight.dtype]
    for rows in (hard, ~hard):
        assert rms(errors[rows]) <= 2 * rms(eager[rows]) + floor


def rms(values):
    return values.square().mean().sqrt()


HARD = [
    *[(dtype, {"c": 0.0}) for dtype in (FP64, FP32, BF16, FP16)],
    *[(dtype, {"c": 1e-42}) for dtype in (FP32, BF16)],
    *[(FP16, {"c": c}) for c in (1e-6, -1e-6, 1e-8)],
    *[(dtype, {"ratio": ratio}) for dtype in (BF16, FP16) for ratio in (1e2, 1e3, 1e4)],
    *[(FP32, {"ratio": ratio}) for ratio in (1e4, 1e5)],
]
# If y is still enough, or just not.
FAIR = [
    *[(dtype, {"c": c}) for dtype in (FP64, FP32, BF16) for c in (1e-3, -1.0, 1e-10, 1e-25, 1e-36)],
    *[(FP16, {"c": c}) for c in (-1.0, 0.1, 2**-7.9, 2**-8.1, 1e-3, 1e-4, 1e-5)],
    *[(dtype, {"ratio": ratio}) for dtype in (FP64, FP32, BF16, FP16) for ratio in (1, 2, 3, 5, 10)],
    *[(FP32, {"ratio": ratio}) for ratio in (1e2, 1e3)],
]


@pytest.mark.parametrize(
    ("dtype", "case", "form"),
    [(*case, form) for case in HARD for form in FORMS]
    + [(*case, form) for case, form in zip(FAIR, itertools.cycle(FORMS), strict=False)],
)
def test_magnitude_gradient_of_hard_rows(dtype, case, form):
    problem, hard = hard_problem(dtype, **case)
    probe = randn(300, 12, seed=9).to(dtype)
    found = problem.gradients(problem.y(form), probe)["m"]
    assert_good(magnitude_errors(problem, probe, found), problem, probe, hard)


@pytest.mark.parametrize(("dtype", "case"), HARD)
def test_the_plain_formula_fails_at_hard_rows(dtype, case):
    """What makes the test above one that can fail, and only the hard rows cost a product."""
    problem, hard = hard_problem(dtype, **case)
    probe = randn(300, 12, seed=9).to(dtype)
    y = problem.y("base_out")
    errors = magnitude_errors(problem, probe, plain_magnitude_gradient(problem, problem.y(), probe))
    with pytest.raises(AssertionError):
        assert_good(errors, problem, probe, hard)
    # the other rows are not to blame
    assert_good(errors.masked_fill(hard, 0), problem, probe, hard)
    problem.gradients(y, probe)
    (index,) = problem.products
    assert index.tolist() == hard.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_large_token_does_not_hide_that_the_others_are_lost(dtype):
    """The first token's activations are often far larger than all others', and it may get no gradient."""
    ratio, size = (1e5, 1e3) if dtype is FP32 else (30, 100)
    problem, hard = hard_problem(dtype, ratio=ratio)
    with torch.no_grad():
        problem.leaves["x"][0] *= size
    probe = randn(300, 12, seed=9).to(dtype)
    probe[0] = 0
    found = problem.gradients(problem.y(), probe)["m"]
    assert_good(magnitude_errors(problem, probe, found), problem, probe, hard)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129])
def test_a_drowned_row_is_noticed_for_any_number_of_tokens(n):
    problem = Problem(n, dtype=BF16).set(bias=torch.full((7,), 1e4))
    y = problem.y("base_out")
    problem.gradients(y, randn(n, 7).to(BF16))
    assert [index.tolist() for index in problem.products] == ([list(range(7))] if n else [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [0, 1])
def test_rows_without_magnitude_of_few_tokens(n, form):
    problem = Problem(n)
    problem.set(m=problem.leaves["m"].detach().index_fill(0, torch.tensor([2, 5]), 0.0))
    check(problem, form)


def test_magnitude_gradient_asks_for_the_lost_rows_only():
    y, g, c = randn(30, 5, seed=1), randn(30, 5, seed=2), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5], dtype=FP64)
    asked = []

    def z_at(index):
        asked.append(index)
        return torch.full((30, 5 if index is None else len(index)), 3.0, dtype=FP64)

    sums = (g * y).sum(0)
    found = parts.magnitude_gradient(sums, g, y, c, None, z_at)
    kept = [0, 2, 4]
    torch.testing.assert_close(found[kept], (sums / c)[kept])
    torch.testing.assert_close(found[[1, 3]], 3 * g.sum(0)[[1, 3]])
    assert [index.tolist() for index in asked] == [[1, 3]]
    torch.testing.assert_close(parts.magnitude_gradient(None, g, None, c, None, z_at), 3 * g.sum(0))
    assert asked[1:] == [None]
    torch.testing.assert_close(parts.magnitude_gradient(sums, g, y, c.abs() + 1, None, z_at), sums / (c.abs() + 1))
    assert len(asked) == 2


@pytest.mark.parametrize("n", [8, 100])
def test_the_gradient_of_fp32_factors_is_rounded_once(n):
    """Over an fp16 base with small gradients: a second rounding would lose most of B's."""
    problem = Problem(n, dtype=FP16, factors=FP32)
    probe = 1e-5 * randn(n, 7, seed=3).to(FP16)
    found = problem.gradients(problem.y(), probe)["B"]
    truth, leaves = problem.truth()
    expected = gradients(truth, leaves, probe)["B"]
    eager = problem.gradients(problem.eager(), probe)["B"]
    assert distance(found, expected) <= distance(eager, expected) + 2**-10
