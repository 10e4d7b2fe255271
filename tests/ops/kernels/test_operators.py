"""The operators for torch.compile give what the autograd function gives, and keep torch's rules."""

import platform
from itertools import product

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, S, randn, tensors

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import dora_peft
from dora_peft.ops import linear
from dora_peft.ops.kernels import fused, operators
from dora_peft.ops.kernels.options import KernelOptions


@pytest.fixture(autouse=True)
def _by_kernels():
    with dora_peft.implementation("triton"):
        yield


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_keep_torchs_rules(bias, p):
    x, weight, b, A, B, m, v = tensors()
    seed = torch.tensor([2**40 + 1], device=x.device) if p else None
    c = (m / v).detach().requires_grad_()
    args = (x, weight, b if bias else None, A, B, c, seed, S, p, 7)
    torch.library.opcheck(torch.ops.dora_peft.linear.default, args)


@pytest.mark.parametrize("needed", list(product([False, True], repeat=4))[1:])
def test_the_operator_gives_what_the_function_gives(needed):
    x, weight, bias, A, B, m, v = tensors()
    for leaf, need in zip((x, A, B, m), needed, strict=True):
        leaf.requires_grad_(need)
    leaves = [leaf for leaf, need in zip((x, A, B, m), needed, strict=True) if need]
    expected = linear.linear(x, A, B, m / v, S, weight=weight, bias=bias)
    found = linear.linear_operator(x, weight, bias, A, B, m / v, S, 0.0, 7)
    assert torch.equal(found, expected)
    probe = randn(*found.shape, seed=8)
    gradients = zip(
        torch.autograd.grad(found, leaves, probe), torch.autograd.grad(expected, leaves, probe), strict=True
    )
    for one, other in gradients:
        assert torch.equal(one, other)


def test_the_operator_sees_that_its_output_was_overwritten():
    """By a kernel outside of the compiled graph, by raw pointer."""
    x, weight, bias, A, B, m, v = tensors()
    probe = randn(len(x), len(weight), seed=8)
    expected = torch.autograd.grad(linear.linear(x, A, B, m / v, S, weight=weight, bias=bias), (x, A, B, m), probe)
    y = linear.linear_operator(x, weight, bias, A, B, m / v, S, 0.0, 7)
    y.detach().view(-1).data.mul_(3) if DEVICE != "cpu" else y.detach().numpy().__imul__(3)
    for one, other in zip(torch.autograd.grad(y, (x, A, B, m), probe), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_fake_operators_know_shapes_and_dtypes():
    x, weight, bias, A, B, m, v = tensors(BF16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y, u, rows, diagonal = torch.ops.dora_peft.linear(
            x.new_empty(2, 3, 16), weight, bias, A, B, m / v, None, S, 0.0, 7
        )
    assert (y.shape, y.dtype) == ((2, 3, 8), BF16)
    assert (u.shape, u.dtype) == ((6, 3), BF16)
    assert (rows.shape, rows.dtype) == ((6, 8), BF16)
    assert (diagonal.shape, diagonal.dtype) == ((0,), BF16)
    u = fused.forward(x, None, weight, bias, A, B, m / v, KernelOptions.of(S, 0.0, None, ()))[1]
    assert u.shape == (6, 3)


@pytest.mark.parametrize("needed", list(product([False, True], repeat=5)))
def test_which_gradients_are_needed_travels_in_one_number(needed):
    assert operators._unpacked(operators._packed(needed)) == needed
