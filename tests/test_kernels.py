"""Each Triton kernel against the same in float64: on a GPU where there is one, in Triton's interpreter elsewhere."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft import dropout_kernels as dropout
from dora_peft import kernels as subject

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S, P = 0.7, 0.3
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]  # of x and W0, of A and B
# N, in, out, r: alone, below and above every block size, none a multiple of one
SIZES = [(1, 1, 1, 1), (3, 8, 5, 2), (17, 33, 65, 16), (70, 130, 257, 20), (131, 48, 129, 100)]
LARGE = [(1, 4096, 4096, 16), (8192, 4096, 1024, 16), (65536, 64, 300, 7), (513, 1000, 4097, 384), (77, 333, 500, 768)]
ALL = [*SIZES, *(pytest.param(size, marks=pytest.mark.gpu) for size in LARGE)]
ROUNDING = {FP32: 2**-20, BF16: 2**-8, FP16: 2**-11}  # of a result in this dtype, relative to its norm


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every fresh buffer is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(found, expected, times=1.0):
    """Within the rounding of the result's dtype, relative to its norm."""
    assert found.shape == expected.shape
    size = expected.norm().item()
    distance = (found.double() - expected).norm().item()
    assert distance <= times * ROUNDING[found.dtype] * (size or 1), distance / (size or 1)


class Tensors:
    def __init__(self, size, dtype=FP32, factors=None, bias=True):
        length, width, out, r = size
        factors = factors or dtype
        self.x = randn(length, width, dtype=dtype, seed=1)
        self.weight = randn(out, width, dtype=dtype, seed=2) / width**0.5
        self.A = (randn(r, width, seed=3) / width**0.5).to(factors)
        self.B = (randn(out, r, seed=4) / r**0.5).to(factors)
        self.c = 1 + 0.3 * randn(out, seed=5).tanh()
        self.bias = randn(out, dtype=dtype, seed=6) if bias else None
        self.g = randn(length, out, dtype=dtype, seed=7)
        self.u = self.x @ self.A.to(dtype).T
        self.z = F.linear(self.x, self.weight, self.bias)

    def offset(self):
        return 0.0 if self.bias is None else self.bias.double()

    def y(self):
        low_rank = self.u.double() @ (S * self.B.to(self.u.dtype).double()).T
        return self.c.double() * (self.z.double() - self.offset() + low_rank) + self.offset()


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_compose(dtype, factors, bias, size):
    t = Tensors(size, dtype, factors, bias)
    out = torch.empty_like(t.z)
    assert subject.compose(t.z, t.u, t.B, t.c, t.bias, S, out=out) is out
    assert_close(out, t.y(), times=4)  # the parts may be larger than their sum
    folded = (t.B * (S * t.c)[:, None]).to(dtype)
    assert torch.equal(subject.compose(t.z, t.u, folded, t.c, t.bias, None, out=torch.empty_like(t.z)), out)
    in_place = t.z.clone()
    assert torch.equal(subject.compose(in_place, t.u, t.B, t.c, t.bias, S, out=in_place), out)


def test_compose_of_an_adapter_that_changes_nothing_gives_the_bits_of_the_base():
    t = Tensors((17, 33, 65, 5), BF16)
    t.B.zero_()
    t.c.fill_(1)
    assert torch.equal(subject.compose(t.z, t.u, t.B, t.c, t.bias, S, out=torch.empty_like(t.z)), t.z)


def test_compose_leaves_the_columns_around_it_alone():
    t = Tensors((17, 33, 65, 5))
    wide = torch.full((17, 100), 7.0, device=DEVICE)
    subject.compose(t.z, t.u, t.B, t.c, t.bias, S, out=wide[:, :65])
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
    assert torch.equal(subject.scale_and_sum(g, t.c, y, t.bias)[1], sums)  # deterministic


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
    scale = products.square().sum(0).sqrt()  # of the roundings of y, which are independent of one another
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


# ---- dropout


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_mask_statistics(p):
    shape = torch.Size([300, 257])
    mask = dropout.dropout_mask(shape, seed(1), p, DEVICE)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    n, kept = mask.numel(), dropout.threshold(p)[1]
    deviation = (kept * (1 - kept) / n) ** 0.5
    assert abs(mask.mean().item() - kept) < 5 * deviation
    centred = mask - kept
    for one, other in [
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[:, 8:], centred[:, :-8]),
    ]:
        correlation = (one * other).mean().item() / (kept * (1 - kept))
        assert abs(correlation) < 5 / n**0.5
    assert not torch.equal(mask, dropout.dropout_mask(shape, seed(2), p, DEVICE))
    assert torch.equal(mask[:7, :9], dropout.dropout_mask(torch.Size([7, 9]), seed(1), p, DEVICE))  # whatever the block


def test_masks_of_nothing_and_of_all():
    assert dropout.dropout_mask(torch.Size([9, 17]), seed(1), 0.0, DEVICE).all()
    assert not dropout.dropout_mask(torch.Size([9, 17]), seed(1), 1.0, DEVICE).any()


def test_seeds_follow_torchs():
    torch.manual_seed(5)
    one, other = dropout.draw_seed(torch.device(DEVICE)), dropout.draw_seed(torch.device(DEVICE))
    torch.manual_seed(5)
    assert dropout.draw_seed(torch.device(DEVICE)) == one
    assert one != other
    torch.set_default_device("meta")
    try:
        assert isinstance(dropout.draw_seed(torch.device(DEVICE)), int)
    finally:
        torch.set_default_device(None)


def seed(number):
    return torch.tensor([number], dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_products_with_dropout(dtype, factors, size):
    """One mask in all three, though they go through x in blocks of different shapes."""
    t = Tensors(size, dtype, factors)
    mask = dropout.dropout_mask(t.x.shape, seed(3), P, DEVICE).double()
    A, dropped = t.A.to(dtype).double(), mask * t.x.double()
    assert_close(dropout.dropped_product(t.x, t.A, seed(3), P), dropped @ A.T)
    du = randn(size[0], size[3], dtype=dtype, seed=8)
    d_A = dropout.dropped_gradient(du, t.x, seed(3), P, factors)
    assert d_A.dtype is factors
    assert_close(d_A, du.double().T @ dropped)
    low_rank = mask * (du.double() @ A)
    assert_close(dropout.add_low_rank(None, du, t.A, seed(3), P), low_rank)
    dx = randn(*t.x.shape, dtype=dtype, seed=9)
    expected = dx.double() + low_rank
    assert dropout.add_low_rank(dx, du, t.A, seed(3), P) is dx
    assert_close(dx, expected)


@pytest.mark.parametrize("number", [3, 2**32 + 1, 2**62 - 1])
def test_seeds_on_the_host_and_on_the_device_draw_the_same_mask(number):
    shape = torch.Size([70, 33])
    mask = dropout.dropout_mask(shape, number, P, DEVICE)
    assert torch.equal(mask, dropout.dropout_mask(shape, seed(number), P, DEVICE))
    t = Tensors((70, 33, 8, 5))
    for function, inputs in [
        (dropout.dropped_product, (t.x, t.A)),
        (lambda *args: dropout.dropped_gradient(*args, FP32), (t.u, t.x)),
    ]:
        both = [function(*inputs, at, P) for at in (number, seed(number))]
        assert torch.equal(*both)


def test_products_with_dropout_of_a_strided_input():
    t = Tensors((17, 33, 8, 5))
    wide = torch.stack([t.x, -t.x], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(dropout.dropped_product(wide, t.A, seed(3), P), dropout.dropped_product(t.x, t.A, seed(3), P))
    du = randn(17, 5)
    results = [dropout.dropped_gradient(du, x, seed(3), P, FP32) for x in (wide, t.x.T.contiguous().T, t.x)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_no_tokens():
    t = Tensors((0, 9, 7, 3))
    assert subject.compose(t.z, t.u, t.B, t.c, t.bias, S, out=t.z).shape == (0, 7)
    scaled, sums = subject.scale_and_sum(t.g, t.c, t.z, t.bias)
    assert scaled.shape == (0, 7)
    d_c = subject.magnitude_gradient(sums, t.g, t.z, t.x, t.weight, t.u, t.B, t.c, t.bias, S)
    assert torch.equal(d_c, torch.zeros_like(d_c))
    assert dropout.dropped_product(t.x, t.A, seed(3), P).shape == (0, 3)
    assert not dropout.dropped_gradient(t.u, t.x, seed(3), P, FP32).any()


@pytest.mark.parametrize(
    "words", [["90"], pytest.param(["80", "90", "all"], marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_kernels_compile(words, tmp_path):
    """The compiler refuses what the interpreter takes. A fresh cache, so that it has to compile."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    count, shared = map(int, result.stdout.split())
    assert count >= 2 * 20
    assert shared <= 227 * 1024  # what a Hopper has; smaller GPUs leave out what does not fit
