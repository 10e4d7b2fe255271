"""Each Triton kernel against the same in float64: on a GPU where there is one, in Triton's interpreter elsewhere."""

import platform

import pytest
import torch
import torch.nn.functional as F
from kernel_fixtures import (  # noqa: F401 - a fixture
    ALL,
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    ROUNDING,
    SIZES,
    S,
    Tensors,
    assert_close,
    poisoned_memory,
)

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels import linear as subject


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_scaled_sum(dtype, factors, bias, size):
    t = Tensors(size, dtype, factors, bias)
    out = torch.empty_like(t.z)
    assert subject.scaled_sum(t.z, t.u, t.B, t.c, t.bias, S, out=out) is out
    # the parts may be larger than their sum
    assert_close(out, t.y(), times=4)
    folded = (t.B * (S * t.c)[:, None]).to(dtype)
    assert torch.equal(subject.scaled_sum(t.z, t.u, folded, t.c, t.bias, None, out=torch.empty_like(t.z)), out)
    in_place = t.z.clone()
    assert torch.equal(subject.scaled_sum(in_place, t.u, t.B, t.c, t.bias, S, out=in_place), out)


def test_scaled_sum_of_an_adapter_that_changes_nothing_gives_the_bits_of_the_base():
    t = Tensors((17, 33, 65, 5), BF16)
    t.B.zero_()
    t.c.fill_(1)
    assert torch.equal(subject.scaled_sum(t.z, t.u, t.B, t.c, t.bias, S, out=torch.empty_like(t.z)), t.z)


def test_scaled_sum_leaves_the_columns_around_it_alone():
    t = Tensors((17, 33, 65, 5))
    wide = torch.full((17, 100), 7.0, device=DEVICE)
    subject.scaled_sum(t.z, t.u, t.B, t.c, t.bias, S, out=wide[:, :65])
    assert_close(wide[:, :65], t.y())
    assert (wide[:, 65:] == 7).all()


LAYOUTS = {
    "contiguous": lambda g: g,
    "transposed": lambda g: g.T.contiguous().T,
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "the same for all tokens": lambda g: g[:1].expand_as(g),
    "one number": lambda g: g[:1, :1].expand_as(g),
}


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_scale_and_sum(dtype, bias, layout, size):
    t = Tensors(size, dtype, bias=bias)
    g, y = LAYOUTS[layout](t.g), t.y().to(dtype)
    scaled, sums = subject.scale_and_sum(g, t.c, y, t.bias)
    assert scaled.dtype is dtype
    assert scaled.is_contiguous()
    assert_close(scaled, t.c.double() * g.double())
    products = g.double() * (y.double() - t.offset())
    assert sums.dtype is FP32
    error = (sums.double().sum(0) - products.sum(0)).abs()
    assert (error <= 2**-18 * products.abs().sum(0)).all()
    assert torch.equal(subject.scale_and_sum(g, t.c, None, t.bias)[0], scaled)
    # deterministic
    assert torch.equal(subject.scale_and_sum(g, t.c, y, t.bias)[1], sums)


@pytest.mark.parametrize("case", ["kept", "zeros", "drowned", "all lost"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_magnitude_gradient(dtype, size, case):
    t = Tensors(size, dtype, bias=case != "zeros")
    if case == "zeros":
        t.c[::3] = 0
    elif case == "drowned":
        t.bias[::2] = 10000.0
    elif case == "all lost":
        t.c.zero_()
    t.z = F.linear(t.x, t.weight, t.bias)
    y = t.y().to(dtype)
    _, sums = subject.scale_and_sum(t.g, t.c, y, t.bias)
    found = subject.magnitude_gradient(sums, t.g, y, t.x, t.weight, t.u, t.B, t.c, t.bias, S)
    truth = t.x.double() @ t.weight.double().T + S * t.u.double() @ t.B.double().T
    products = t.g.double() * truth
    assert torch.isfinite(found).all()
    # of the roundings of y, which are independent of one another
    scale = products.square().sum(0).sqrt()
    allowed = 3 * ROUNDING[dtype] * (scale + products.abs().max() * 0.5) + 1e-5 * products.abs().sum(0)
    assert ((found.double() - products.sum(0)).abs() <= allowed).all()


def test_the_plain_formula_loses_what_the_kernel_computes_again():
    t = Tensors((64, 33, 40, 5), BF16)
    t.bias[::2] = 10000.0
    t.z = F.linear(t.x, t.weight, t.bias)
    y = t.y().to(BF16)
    _, sums = subject.scale_and_sum(t.g, t.c, y, t.bias)
    found = subject.magnitude_gradient(sums, t.g, y, t.x, t.weight, t.u, t.B, t.c, t.bias, S).double()
    truth = (t.g.double() * (t.x.double() @ t.weight.double().T + S * t.u.double() @ t.B.double().T)).sum(0)
    plain = (sums.sum(0) / t.c).double()
    assert (found - truth)[::2].norm() < 0.02 * (plain - truth)[::2].norm()


def test_no_tokens():
    t = Tensors((0, 9, 7, 3))
    assert subject.scaled_sum(t.z, t.u, t.B, t.c, t.bias, S, out=t.z).shape == (0, 7)
    scaled, sums = subject.scale_and_sum(t.g, t.c, t.z, t.bias)
    assert scaled.shape == (0, 7)
    d_c = subject.magnitude_gradient(sums, t.g, t.z, t.x, t.weight, t.u, t.B, t.c, t.bias, S)
    assert torch.equal(d_c, torch.zeros_like(d_c))
