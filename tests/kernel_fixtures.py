"""What the tests of the kernels share: sizes, dtypes, random tensors, and buffers that are full of NaN."""

import pytest
import torch
import torch.nn.functional as F

from dora_peft import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S, P = 0.7, 0.3
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# of x and W0, of A and B
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]
# N, in, out, r: alone, below and above every block size, none a multiple of one
SIZES = [(1, 1, 1, 1), (3, 8, 5, 2), (17, 33, 65, 16), (70, 130, 257, 20), (131, 48, 129, 100)]
LARGE = [(1, 4096, 4096, 16), (8192, 4096, 1024, 16), (65536, 64, 300, 7), (513, 1000, 4097, 384), (77, 333, 500, 768)]
ALL = [*SIZES, *(pytest.param(size, marks=pytest.mark.gpu) for size in LARGE)]
# of a result in this dtype, relative to its norm
ROUNDING = {FP32: 2**-20, BF16: 2**-8, FP16: 2**-11}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every fresh buffer is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def tensors(dtype=FP32, length=6, width=16, out=8, r=3):
    """x, W0, b, A, B, m and v, those that are trained with a gradient."""
    weight, A, B = randn(out, width, seed=1), randn(r, width, seed=2), randn(out, r, seed=3)
    norm = reference.weight_norm(weight, A, B, S)
    leaves = [randn(length, width, seed=4), randn(out, seed=5), A, B]
    x, bias, A, B = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    return x, weight.to(dtype), bias.detach(), A, B, norm.clone().requires_grad_(), norm


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
