"""The composition of outputs and the low-rank branches against dense float64 matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_peft.ops import compose

S = 0.8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_compose(dtype, bias):
    torch.manual_seed(0)
    z, c = torch.randn(3, 4, 6, dtype=dtype), torch.rand(6, dtype=dtype) + 0.5
    b = torch.randn(6, dtype=dtype) if bias else torch.zeros(6, dtype=dtype)
    torch.testing.assert_close(compose.compose(z, c, b if bias else None, dtype), c * z + b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_compose_in_low_precision(dtype, offset):
    torch.manual_seed(0)
    z = torch.randn(200, 64).to(dtype)
    b = (torch.randn(64) + offset).to(dtype)
    c = 1 + 0.05 * torch.randn(64)
    truth = c * z.float() + b.float()
    naive = c.to(dtype) * z + b
    found = compose.compose(z, c, b, dtype)
    assert found.dtype == dtype
    error, naive_error = ((y.float() - truth).abs().mean() for y in (found, naive))
    rounding = (truth.to(dtype).float() - truth).abs().mean()
    assert error <= naive_error
    # one rounding, that of the result
    assert error <= 1.1 * rounding + 1e-6


def test_compose_paper():
    torch.manual_seed(0)
    base, dropped, low_rank = torch.randn(3, 5, 6).unbind(0)
    c = torch.rand(6)
    expected = base + (c - 1) * dropped + c * low_rank
    torch.testing.assert_close(compose.compose_paper(base, dropped, low_rank, c, None, torch.float32), expected)
    found = compose.compose_paper(base, dropped, None, c, c, torch.float32)
    torch.testing.assert_close(found, base + (c - 1) * dropped + c)
    half = [t.bfloat16() for t in (base, dropped, low_rank)]
    assert compose.compose_paper(*half, c, c, torch.bfloat16).dtype == torch.bfloat16


def test_linear_branch():
    torch.manual_seed(0)
    x, (A, B) = torch.randn(2, 3, 20), (torch.randn(4, 20), torch.randn(7, 4))
    torch.testing.assert_close(compose.linear_branch(x, A, B, S), F.linear(x, S * B @ A))
    assert compose.linear_branch(x.bfloat16(), A, B, S).dtype == torch.bfloat16


def block_diagonal(B, groups):
    """B [out, r / groups] over its own group's ranks only: [out, r]."""
    out, k = B.shape
    dense = B.new_zeros(out, k * groups)
    for j in range(out):
        group = j // (out // groups)
        dense[j, group * k : (group + 1) * k] = B[j]
    return dense


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_branch(dim, padding, groups):
    torch.manual_seed(0)
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    stride = 1 if padding == "same" else 2
    conv = cls(4, 6, 3, stride=stride, padding=padding, dilation=2, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 4, *[7] * dim, dtype=torch.float64)
    A = torch.randn(2, 4, *[3] * dim, dtype=torch.float64)
    B = torch.randn(6, 2 // groups, *[1] * dim, dtype=torch.float64)
    kernel = S * block_diagonal(B.flatten(1), groups) @ A.flatten(1)
    dense = cls(4, 6, 3, stride=stride, padding=padding, dilation=2, bias=False, dtype=torch.float64)
    dense.weight = nn.Parameter(kernel.view(6, 4, *[3] * dim))
    torch.testing.assert_close(compose.conv_branch(x, A, B, S, conv), dense(x))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("embed_scale", [None, 3.0])
def test_embedding_branch(embed_scale, padding_idx):
    torch.manual_seed(0)
    A = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2, 2], [8, 1, 2]])
    after = 1.0 if embed_scale is None else embed_scale
    found = compose.embedding_branch(ids, A, B, S, embed_scale=embed_scale, padding_idx=padding_idx)
    expected = S * (B @ A).T[ids] * after
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    grad_A, grad_B = torch.autograd.grad(found, (A, B), probe)
    true_A, true_B = torch.autograd.grad(expected, (A, B), probe)
    if padding_idx is not None:
        true_A = true_A.index_fill(1, torch.tensor([padding_idx]), 0.0)
    torch.testing.assert_close((grad_A, grad_B), (true_A, true_B))
