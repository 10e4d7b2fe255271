"""Dropout of the linear function, and its masks."""

import pytest
import torch
from covering import pairs
from linear_fixtures import (
    BF16,
    FLOOR,
    FORMS,
    FP16,
    FP32,
    FP64,
    Problem,
    assert_equal_gradients,
    backward,
    by_kernels,
    check,
    distance,
    gradients,
    randn,
)
from torch.utils.checkpoint import checkpoint

from dora_peft.ops.dropout import dropout_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def drawn_mask(shape, p, dtype):
    """The mask that the next layer draws, and the exact probability to keep an element."""
    if not by_kernels(dtype):
        return dropout_mask(shape, p, torch.device("cpu"))
    from dora_peft.ops.kernels import dropout as dropout_kernels

    seed = dropout_kernels.draw_seed(torch.device("cpu"))
    return dropout_kernels.drawn_mask(shape, seed, p, torch.device("cpu")), dropout_kernels.threshold(p)[1]


@pytest.mark.parametrize(
    ("dtype", "form", "bias", "p"), pairs([FP64, FP32, BF16, FP16], FORMS, [False, True], [0.3, 1.0, 1e-6])
)
def test_dropout(dtype, form, bias, p):
    problem = Problem(3, 5, dtype=dtype, bias=bias)
    torch.manual_seed(1)
    y = problem.y(form, dropout_p=p)
    torch.manual_seed(1)
    mask, kept = drawn_mask(torch.Size([15, 9]), p, dtype)
    assert abs(kept - (1 - p)) <= 2**-17
    drop = mask.view(3, 5, 9).double() / (kept or 1)
    check(problem, form, y=y, drop=drop)


@pytest.mark.parametrize("x_needs_it", [True, False])
def test_dropout_where_the_output_changes(x_needs_it):
    """dm from x again: it needs the dropped u, and 1 / (1 - p) once."""
    problem = Problem(15).only("A", "B", "m", *["x"] * x_needs_it)
    torch.manual_seed(1)
    y = problem.y(dropout_p=0.4)
    torch.manual_seed(1)
    mask, kept = dropout_mask(torch.Size([15, 9]), 0.4, y.device)
    probe = randn(15, 7, seed=9)
    truth, leaves = problem.truth(mask.double() / kept)
    expected = gradients(3 * truth, leaves, probe)
    found = problem.gradients(y.mul_(3.0), probe)
    for name, grad in found.items():
        assert distance(grad, expected[name]) <= FLOOR[FP64], name


def test_everything_dropped_leaves_no_low_rank_part():
    problem = Problem(15)
    problem.y(dropout_p=1.0).square().sum().backward()
    assert not problem.leaves["A"].grad.any()
    assert not problem.leaves["B"].grad.any()
    assert problem.leaves["m"].grad.all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_draws_the_same_mask(form, reentrant):
    problem = Problem(3, 5)
    probe = randn(3, 5, 7, seed=9)
    torch.manual_seed(1)
    expected = backward(problem, (problem.y(form, dropout_p=0.5) * probe).sum())
    torch.manual_seed(1)

    def layer(x):
        return problem.y(form, x=x, dropout_p=0.5)

    y = checkpoint(layer, problem.leaves["x"], use_reentrant=reentrant)
    # what comes between has its own numbers
    torch.manual_seed(2)
    assert_equal_gradients(backward(problem, (y * probe).sum()), expected, FLOOR[FP64])


# 4 does not divide their product
MASKED = torch.Size([501, 799])


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_mask_statistics(p):
    """Within 5 standard deviations of independent draws; four neighbours come from one 64-bit number."""
    mask, kept = dropout_mask(MASKED, p, torch.device("cpu"))
    assert mask.dtype == torch.bool
    assert mask.shape == MASKED
    count = mask.numel()
    sigma = (kept * (1 - kept)) ** 0.5
    assert abs(mask.double().mean().item() - kept) < 5 * sigma / count**0.5
    lanes = (mask.flatten()[: count // 4 * 4].view(-1, 4).double() - kept) / sigma
    assert (lanes.mean(0).abs() < 5 / len(lanes) ** 0.5).all()
    # and the next number's
    following = torch.cat([lanes[:-1], lanes[1:]], dim=1)
    correlation = following.T @ following / len(following)
    assert (correlation - correlation.diag().diag()).abs().max() < 5 / len(following) ** 0.5


@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (1, 3), (5, 7)])
@pytest.mark.parametrize("p", [1e-9, 0.5, 1 - 1e-9, 1.0])
def test_masks_of_any_size(p, shape):
    mask, kept = dropout_mask(torch.Size(shape), p, torch.device("cpu"))
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert abs(kept - (1 - p)) <= 2**-17
    assert mask.all() or kept < 1
    assert not mask.any() or kept > 0


def test_masks_follow_the_global_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return [dropout_mask(torch.Size([40, 40]), 0.5, torch.device("cpu"))[0] for _ in range(2)]

    (first, second), again = draw(1), draw(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(2)[0])
