"""v and c against dense float64 matrices."""

import pytest
import torch
from torch import nn

from dora_peft import reference
from dora_peft.bases import base_weight
from dora_peft.ops import norm

S = 0.8
# fp32 sums against float64 ones; a bf16 base holds bf16 values exactly, and is summed in fp32 as well
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float64: 1e-13}


def seam(weight):
    """The BaseWeight of a linear layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return base_weight(layer, "layer")


def factors(out, width, r, dtype=torch.float32):
    """A and B as large as W0: the worst case for the factored sum that is not a cancellation."""
    return torch.randn(r, width, dtype=dtype), torch.randn(out, r, dtype=dtype) / r**0.5


def factored_norm(weight, A, B, s=S):
    w = seam(weight)
    return norm.factored_norm_squared(w, w.row_norms_squared(), A.to(w.dtype), B.to(w.dtype), s).clamp_(min=0).sqrt_()


def true_norm(weight, A, B, s=S):
    return reference.weight_norm(weight.double(), A.double(), B.double(), s)


def worst(found, expected):
    return ((found.double() - expected) / expected).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("r", [1, 3, 16, 40])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 129), (65, 1001)])
def test_factored_norm_equals_the_dense_one(shape, r, dtype):
    torch.manual_seed(r)
    out, width = shape
    weight = torch.randn(shape).to(dtype)
    A, B = factors(out, width, r, torch.float64 if dtype == torch.float64 else torch.float32)
    assert worst(factored_norm(weight, A, B), true_norm(weight, A, B)) < RELATIVE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
# as many as fit, of 33
@pytest.mark.parametrize("block_rows", [0.5, 1, 8, 32, 33, 100])
def test_norm_from_blocks_of_rows_equals_the_dense_one(block_rows, dtype, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(33, 57).to(dtype)
    A, B = factors(33, 57, 3, torch.float64 if dtype == torch.float64 else torch.float32)
    w = seam(weight)
    base_squared, asked, block = w.row_norms_squared(), [], type(w).block
    monkeypatch.setattr(norm, "NORM_BLOCK_BYTES", int(block_rows * 57 * w.dtype.itemsize))
    monkeypatch.setattr(type(w), "block", lambda self, *at: (asked.append(at[1] - at[0]), block(self, *at))[1])
    found = norm.row_norms(w, base_squared, A, B, S)
    assert sum(asked) == 33
    assert max(asked) == min(33, max(1, int(block_rows)))
    assert worst(found, true_norm(weight, A, B)) < RELATIVE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# v / sqrt(||W0||^2 + s^2 ||BA||^2)
@pytest.mark.parametrize("remainder", [0.3, 0.1, 1e-2, 1e-3])
def test_factored_norm_of_cancelling_rows(dtype, remainder):
    torch.manual_seed(0)
    A, B = factors(65, 300, 5)
    weight = (-S * B @ A).to(dtype)
    noise = torch.randn_like(weight.float())
    noise *= remainder * 2**0.5 * weight.float().norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    # the odd rows cancel to the rounding of W0
    weight[::2] = (weight + noise)[::2].to(dtype)
    # and some do not cancel
    weight[5:9] = torch.randn(4, 300).to(dtype)
    expected = true_norm(weight, A, B)
    naive = reference.weight_norm(weight.float(), A, B, S)
    even = torch.arange(65) % 2 == 0
    error = ((factored_norm(weight, A, B).double() - expected) / expected).abs()
    naive_error = ((naive.double() - expected) / expected).abs()
    assert error[even].max() < 2 * naive_error[even].max() + RELATIVE[dtype]
    assert error.max() < 2 * naive_error.max() + RELATIVE[dtype]


def test_cancelling_rows_are_read_in_small_blocks(monkeypatch):
    """A whole matrix that cancels must not be made dense at once."""
    torch.manual_seed(0)
    A, B = factors(40, 33, 3)
    weight = (-S * B @ A) * 1.01
    w = seam(weight)
    w.dense_rows = 7
    asked = []
    rows = type(w).rows
    monkeypatch.setattr(type(w), "rows", lambda self, index: (asked.append(len(index)), rows(self, index))[1])
    found = norm.factored_norm_squared(w, w.row_norms_squared(), A, B, S).sqrt()
    assert sum(asked) == 40
    assert max(asked) <= 7
    assert worst(found, true_norm(weight, A, B)) < 1e-4


def test_zero_rows_have_the_norm_of_the_change():
    torch.manual_seed(0)
    weight = torch.randn(6, 20)
    A, B = factors(6, 20, 4)
    weight[[1, 2]] = 0
    B[[2, 3]] = 0
    found, expected = factored_norm(weight, A, B), true_norm(weight, A, B)
    assert found[2] == 0
    others = torch.tensor([0, 1, 3, 4, 5])
    assert worst(found[others], expected[others]) < 1e-6


@pytest.mark.parametrize("s", [0.0, -1.3, 64.0])
def test_factored_norm_at_unusual_scalings(s):
    torch.manual_seed(0)
    weight, (A, B) = torch.randn(9, 31), factors(9, 31, 2)
    assert worst(factored_norm(weight, A, B, s), true_norm(weight, A, B, s)) < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_norm_gradcheck(groups):
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, groups=groups, dtype=torch.float64)
    w = base_weight(layer, "conv")
    squared = w.row_norms_squared()
    A = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    B = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, B: norm.weight_norm(w, squared, A, B, S), (A, B))


def test_weight_norm_gradient_of_cancelling_rows():
    torch.manual_seed(0)
    A, B = factors(6, 20, 3, torch.float64)
    weight = -S * B @ A + 1e-3 * torch.randn(6, 20, dtype=torch.float64)
    A.requires_grad_()
    B.requires_grad_()
    w, probe = seam(weight), torch.randn(6, dtype=torch.float64)
    found = torch.autograd.grad(norm.weight_norm(w, w.row_norms_squared(), A, B, S), (A, B), probe)
    expected = torch.autograd.grad(reference.weight_norm(weight, A, B, S), (A, B), probe)
    torch.testing.assert_close(found, expected)


def test_weight_norm_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    weight, (A, B) = torch.randn(16, 40), factors(16, 40, 4)
    # a row that is computed densely
    weight[3] = -S * (B @ A)[3] * 1.1
    expected = true_norm(weight, A, B)
    A.requires_grad_()
    w = seam(weight)
    squared = w.row_norms_squared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm.weight_norm(w, squared, A, B, S)
        (grad,) = torch.autograd.grad(found.sum(), A)
    assert worst(found.detach(), expected) < 1e-5
    dense_A = A.detach().double().requires_grad_()
    (true_grad,) = torch.autograd.grad(true_norm(weight, dense_A, B).sum(), dense_A)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-4)


def test_weight_norm_of_a_vanishing_row_is_floored():
    """v = 0 over W0 != 0 has no direction: rounding level of ||W0|| instead of a division by zero."""
    weight = torch.randn(3, 8)
    A, B = torch.eye(8), -weight.clone() / S
    w = seam(weight)
    value = norm.weight_norm(w, w.row_norms_squared(), A, B, S)
    assert (value > 0).all()
    assert (value <= 1e-6 * weight.norm(dim=1)).all()
    c = norm.scale(torch.zeros(3), value, None)
    assert torch.equal(c, torch.zeros(3))


def test_scale_equals_the_reference():
    m, v = torch.rand(5), torch.rand(5) + 0.1
    tied = torch.tensor([False, True, False, False, True])
    torch.testing.assert_close(norm.scale(m, v, tied), reference.scale(m, v, tied))
    torch.testing.assert_close(norm.scale(m, v, None), reference.scale(m, v))
