"""The approximation of one update: optimal, told exactly, weighted, in blocks of rows."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_fixtures import update

from dora_peft.adapters.export import lowrank
from dora_peft.adapters.export.lowrank import approximate, measured_errors
from dora_peft.adapters.formats import UnreadableError

SPECTRA = {"flat": 0.5, "mixed": 0.02, "low": 0.0}


@pytest.fixture
def iterated(monkeypatch):
    """Nothing is kept, so that only a matrix with as few rows or columns as the sketch is taken as a whole."""
    monkeypatch.setattr(lowrank, "HELD_BYTES", 0)


def optimum(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


def left(change, found, rank, weight=None):
    """||(dW - B A) D||_F by dense matrices."""
    rest = change.dense() - found.lora_B[:, :rank].double() @ found.lora_A[:rank].double()
    return float((rest if weight is None else rest @ weight).norm())


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 60), columns=st.integers(1, 60), rank=st.integers(1, 20), step=st.integers(1, 70),
    scale=st.sampled_from(list(SPECTRA.values())), held=st.booleans(),
)  # fmt: skip
def test_no_rank_is_far_from_the_optimum_and_each_error_is_told(out, columns, rank, step, scale, held):
    change = update(out, columns, scale=scale, seed=out, step=step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "HELD_BYTES", lowrank.HELD_BYTES if held else 0)
        found = approximate(change, rank)
    size = float(change.dense().norm())
    assert found.norm == pytest.approx(size, rel=1e-6)
    for one in range(1, min(rank, out, columns) + 1):
        best = optimum(change.dense(), one)
        assert found.error(one) == pytest.approx(left(change, found, one), rel=1e-3, abs=1e-3 * size)
        assert left(change, found, one) <= 1.01 * best + 2e-6 * size


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("scale", SPECTRA.values(), ids=SPECTRA)
def test_iterating_comes_close_on_every_spectrum(iterated, shape, scale, monkeypatch):
    change = update(*shape, scale=scale, step=64)
    monkeypatch.setattr(lowrank._Rows, "dense", lambda rows: pytest.fail("dW was made as a whole"))
    found = approximate(change, 64)
    for rank in (1, 8, 64):
        best = optimum(change.dense(), rank)
        assert left(change, found, rank) <= 1.015 * best + 2e-6 * found.norm
        assert found.error(rank) == pytest.approx(left(change, found, rank), rel=1e-4, abs=1e-3 * found.norm)
    once = approximate(change, 64, iterations=0)
    # of what the iterations are for
    assert scale == 0 or once.error(64) > 1.03 * optimum(change.dense(), 64)


def test_singular_values_are_those_of_the_update(iterated):
    change = update(90, 130)
    found = approximate(change, 8)
    assert torch.allclose(found.singular_values[:4], torch.linalg.svdvals(change.dense())[:4], rtol=1e-5)
    assert torch.allclose(found.lora_B.T @ found.lora_B, torch.eye(8), atol=1e-5)


def test_errors_fall_with_the_rank():
    found = approximate(update(64, 48), 40)
    errors = [found.error(rank) for rank in range(41)]
    assert errors[0] == pytest.approx(found.norm)
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("shape", [(5, 60), (60, 5), (1, 9), (9, 1)])
def test_a_rank_above_the_matrix_own_is_exact(shape):
    change = update(*shape)
    found = approximate(change, 32)
    assert len(found.lora_A) == min(shape)
    assert left(change, found, 32) <= 2e-6 * found.norm


def test_the_part_of_full_rank_is_measured():
    change = update(40, 30)
    expected = ((change.c.double() - 1)[:, None] * change.weight).norm()
    assert approximate(change, 4).scale_norm == pytest.approx(float(expected), rel=1e-5)
    assert approximate(update(40, 30, scale=0.0), 4).scale_norm < 1e-5


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("shape", [(120, 160), (160, 120), (12, 100), (100, 12)])
def test_a_weighted_fit_is_the_optimum_in_its_norm(shape, held, full, monkeypatch):
    monkeypatch.setattr(lowrank, "HELD_BYTES", lowrank.HELD_BYTES if held else 0)
    change = update(*shape, scale=0.3)
    inputs = torch.randn(4 * shape[1], shape[1]).double() @ torch.randn(shape[1], shape[1]).double()
    inputs *= torch.logspace(0, 2, shape[1])
    weight = inputs.T @ inputs / len(inputs) if full else inputs.square().mean(0)
    root = torch.linalg.cholesky(weight) if full else weight.sqrt().diag()
    rank = 6
    found, plain = approximate(change, rank, weight), approximate(change, rank)
    best = optimum(change.dense() @ root, rank)
    assert left(change, found, rank, root) <= 1.01 * best + 1e-4 * found.weighted_norm
    assert left(change, found, rank, root) < 0.95 * left(change, plain, rank, root)
    assert found.weighted_error(rank) == pytest.approx(left(change, found, rank, root), rel=1e-2)
    # and what it costs without weights is told too
    assert found.error(rank) == pytest.approx(left(change, found, rank), rel=1e-4)
    assert found.error(rank) >= plain.error(rank)


def test_equal_weights_are_none():
    change = update(50, 40)
    plain = approximate(change, 8)
    for weight in (torch.full((40,), 3.0), 3 * torch.eye(40), torch.zeros(40), torch.zeros(40, 40)):
        assert approximate(change, 8, weight).error(8) == pytest.approx(plain.error(8), rel=1e-4)


def test_moments_that_are_negative_by_fp32s_rounding_are_taken():
    """Nearly collinear inputs: the largest eigenvalue is 40 times the mean, and its rounding more than the floor."""
    direction = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    weight = direction @ direction.T
    weight -= 1e-5 * weight.diagonal().mean() * torch.eye(40)
    change = update(50, 40, rank=2, scale=0.0)
    found = approximate(change, 2, weight)
    assert found.error(2) < 1e-2 * found.norm


def test_inputs_that_were_never_seen_are_fitted_last_but_fitted():
    change = update(50, 40, rank=2, scale=0.0)
    seen = torch.ones(40)
    seen[10:] = 0
    found = approximate(change, 2, seen)
    assert found.error(2) < 1e-3 * found.norm


def test_the_same_numbers_come_out_again_and_no_others_are_drawn():
    change = update(300, 280)
    state = torch.random.get_rng_state()
    first = approximate(change, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(approximate(change, 8).lora_A, first.lora_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_of_rounded_factors_is_measured_at_every_rank(dtype):
    change = update(40, 33)
    found = approximate(change, 20)
    lora_A, lora_B = found.lora_A.to(dtype), found.lora_B.to(dtype)
    measured = measured_errors(change, lora_A, lora_B, (1, 8, 16, 32))
    for rank, squared in measured.items():
        rest = change.dense() - lora_B[:, :rank].double() @ lora_A[:rank].double()
        assert squared == pytest.approx(float(rest.square().sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(7), "expected [6]"),
        (-torch.ones(6), "negative"),
        (torch.full((6,), torch.nan), "NaN"),
        (torch.eye(6) + 3 * torch.ones(6, 6).triu(1) + 3 * torch.ones(6, 6).tril(-1), "not positive"),
    ],
)
def test_weights_that_are_none_are_refused(weight, words):
    with pytest.raises(UnreadableError, match=r"module 'layer'") as error:
        approximate(update(5, 6), 2, weight)
    assert words in str(error.value)


def test_an_update_that_is_not_finite_is_refused_by_name():
    change = update(5, 6)
    change.c[2] = torch.nan
    with pytest.raises(UnreadableError, match="update of module 'layer' holds NaN"):
        approximate(change, 2)
