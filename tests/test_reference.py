"""The dense reference: what the paper's equations promise."""

import pytest
import torch
import torch.nn.functional as F

from dora_peft import reference

S = 1.7


def problem(out=7, width=5, r=3, *, seed=0):
    """W0, A, B, m, b in float64, with m away from the norm and A, B, m as leaves."""
    torch.manual_seed(seed)
    weight = torch.randn(out, width, dtype=torch.float64)
    lora_A = torch.randn(r, width, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(out, r, dtype=torch.float64, requires_grad=True)
    magnitude = (0.5 + torch.rand(out, dtype=torch.float64)).requires_grad_()
    return weight, lora_A, lora_B, magnitude, torch.randn(out, dtype=torch.float64)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("r", [1, 3, 9])
def test_initial_magnitude_gives_back_the_plain_sum(r):
    weight, A, B, _, _ = problem(r=r)
    initial = reference.weight_norm(weight, A, B, S)
    torch.testing.assert_close(reference.dora_weight(weight, A, B, initial, S), weight + S * B @ A)


def test_weight_norm_runs_over_rows():
    weight, A, B, _, _ = problem()
    rows = [(weight[j] + S * B[j] @ A).square().sum().sqrt() for j in range(len(weight))]
    torch.testing.assert_close(reference.weight_norm(weight, A, B, S), torch.stack(rows))


@pytest.mark.parametrize("sign", [1, -1])
def test_row_norms_of_the_merged_weight_are_the_magnitudes(sign):
    weight, A, B, m, _ = problem()
    merged = reference.dora_weight(weight, A, B, sign * m, S)
    torch.testing.assert_close(merged.norm(dim=1), m)
    # the direction is that of the sum, or its opposite
    torch.testing.assert_close(F.cosine_similarity(merged, weight + S * B @ A), sign * torch.ones_like(m))


def test_detaching_changes_the_gradients_of_the_factors_only():
    weight, A, B, m, _ = problem()
    probe = torch.randn_like(weight)
    full, detached = (
        gradients((reference.dora_weight(weight, A, B, m, S, detach_norm=d) * probe).sum(), A, B, m)
        for d in (False, True)
    )
    assert not torch.allclose(full[0], detached[0], rtol=1e-3)
    assert not torch.allclose(full[1], detached[1], rtol=1e-3)
    torch.testing.assert_close(full[2], detached[2])


def test_detached_gradient_is_that_of_a_constant_scale():
    weight, A, B, m, _ = problem()
    probe = torch.randn_like(weight)
    constant = (m / reference.weight_norm(weight, A, B, S)).detach()
    expected = gradients((constant[:, None] * (weight + S * B @ A) * probe).sum(), A, B)
    found = gradients((reference.dora_weight(weight, A, B, m, S) * probe).sum(), A, B)
    torch.testing.assert_close(found, expected)


def test_full_gradient_of_B_is_orthogonal_to_the_merged_direction():
    """Moving a row along itself changes nothing, which the detached gradient does not know (sec. 4.1 of the paper)."""
    # r = width: A is invertible, so every move of W0 + s B A is a move of B
    weight, A, B, m, _ = problem(r=5)
    probe = torch.randn_like(weight)
    # dB with s dB A along the row
    radial = torch.linalg.solve(A.detach().T, (weight + S * B @ A).detach().T).T
    for detach in (False, True):
        (grad_B,) = gradients((reference.dora_weight(weight, A, B, m, S, detach_norm=detach) * probe).sum(), B)
        along = (grad_B * radial).sum(1)
        assert torch.allclose(along, torch.zeros_like(along), atol=1e-10) is not detach


def test_gradcheck_of_the_full_gradient():
    weight, A, B, m, b = problem()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def merged(A, B, m):
        return reference.dora_weight(weight, A, B, m, S, detach_norm=False)

    def linear(x, A, B, m):
        return reference.dora_linear(x, weight, A, B, m, S, b, detach_norm=False)

    assert torch.autograd.gradcheck(merged, (A, B, m))
    assert torch.autograd.gradcheck(linear, (x, A, B, m))


def test_tied_rows_are_plain_lora():
    weight, A, B, m, _ = problem()
    tied = torch.zeros(len(weight), dtype=torch.bool)
    tied[[1, 4]] = True
    weight[tied] = 0
    probe = torch.randn_like(weight) * tied[:, None]
    expected = gradients((S * B @ A * probe).sum(), A, B)
    for detach in (True, False):
        merged = reference.dora_weight(weight, A, B, m, S, tied=tied, detach_norm=detach)
        torch.testing.assert_close(merged[tied], (S * B @ A)[tied])
        grad_A, grad_B, grad_m = gradients((merged * probe).sum(), A, B, m)
        torch.testing.assert_close((grad_A, grad_B), expected)
        assert torch.equal(grad_m, torch.zeros_like(m))
        # the other rows do not notice
        alone = reference.dora_weight(weight[~tied], A, B[~tied], m[~tied], S)
        torch.testing.assert_close(merged[~tied], alone)


def test_tied_rows_of_a_fresh_adapter_are_finite():
    weight, A, B, m, _ = problem()
    weight[2] = 0
    start = torch.zeros_like(B).requires_grad_()
    tied = reference.weight_norm(weight, A, start, S) == 0
    assert tied.nonzero().flatten().tolist() == [2]
    assert reference.scale(m, weight.norm(dim=1)).isfinite().sum() == len(m) - 1
    merged = reference.dora_weight(weight, A, start, weight.norm(dim=1), S, tied=tied)
    grad_A, grad_B = gradients((merged * torch.randn_like(merged)).sum(), A, start)
    assert grad_A.isfinite().all()
    assert grad_B.isfinite().all()
    assert (grad_B[2] != 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["branch", "paper"])
def test_without_dropout_a_layer_is_the_merged_weight(mode, bias):
    weight, A, B, m, b = problem()
    b = b if bias else None
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = F.linear(x, reference.dora_weight(weight, A, B, m, S), b)
    torch.testing.assert_close(reference.dora_linear(x, weight, A, B, m, S, b, dropout_mode=mode), expected)
    explicit = reference.dora_linear(x, weight, A, B, m, S, b, dropped=x, dropout_mode=mode)
    torch.testing.assert_close(explicit, expected)


def test_dropout_modes_are_the_documented_formulas():
    weight, A, B, m, b = problem()
    x = torch.randn(6, 5, dtype=torch.float64)
    dropped = F.dropout(x, 0.5)
    c = torch.diag(m / reference.weight_norm(weight, A, B, S))
    branch = (x @ weight.T + S * dropped @ A.T @ B.T) @ c + b
    paper = x @ weight.T + dropped @ weight.T @ (c - torch.eye(7, dtype=c.dtype)) + S * dropped @ A.T @ B.T @ c + b
    found = {
        mode: reference.dora_linear(x, weight, A, B, m, S, b, dropped=dropped, dropout_mode=mode)
        for mode in ("branch", "paper")
    }
    torch.testing.assert_close(found["branch"], branch)
    torch.testing.assert_close(found["paper"], paper)
    assert not torch.allclose(branch, paper)


def test_dropout_modes_have_the_same_expectation():
    weight, A, B, m, b = problem()
    x = torch.randn(1, 5, dtype=torch.float64)
    # all 2^5 masks of p = 0.5, equally likely
    masks = 2.0 * torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    expected = F.linear(x, reference.dora_weight(weight, A, B, m, S), b)
    for mode in ("branch", "paper"):
        y = reference.dora_linear(x.expand(32, 5), weight, A, B, m, S, b, dropped=x * masks, dropout_mode=mode)
        torch.testing.assert_close(y.mean(0, keepdim=True), expected)


def test_unknown_dropout_mode_is_refused():
    weight, A, B, m, _ = problem()
    with pytest.raises(ValueError, match="'branch' or 'paper', found 'both'"):
        reference.dora_linear(weight, weight, A, B, m, S, dropout_mode="both")


def test_combine_is_the_weighted_sum_of_the_changes():
    weight, A, B, m, _ = problem()
    _, A2, B2, m2, _ = problem(r=2, seed=1)
    first, second = (A, B, m, S), (A2, B2, m2, 0.3)
    merged = [reference.dora_weight(weight, *adapter) for adapter in (first, second)]
    torch.testing.assert_close(reference.weighted_sum(weight, [first], [1.0]), merged[0])
    torch.testing.assert_close(reference.weighted_sum(weight, [first, second], [0.0, 0.0]), weight)
    expected = weight * (1 - 0.6 + 0.25) + 0.6 * merged[0] - 0.25 * merged[1]
    torch.testing.assert_close(reference.weighted_sum(weight, [first, second], [0.6, -0.25]), expected)
    with pytest.raises(ValueError, match="zip"):
        reference.weighted_sum(weight, [first, second], [1.0])


def test_combine_leaves_its_weight_alone():
    weight, A, B, m, _ = problem()
    before = weight.clone()
    reference.weighted_sum(weight, [(A.detach(), B.detach(), m.detach(), S)], [1.0])
    assert torch.equal(weight, before)


def test_alpha_divisor():
    assert 16 / reference.alpha_divisor(4, use_rslora=False) == 4.0
    assert 16 / reference.alpha_divisor(4, use_rslora=True) == 8.0
