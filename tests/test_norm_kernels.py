"""The kernel that refreshes v, against the float64 reference: on a GPU or in Triton's interpreter."""

import platform

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft import norm_kernels as subject
from dora_peft import reference
from dora_peft.base_weight import base_weight
from dora_peft.functional import CANCELLATION

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S = 0.5  # exact in binary, so that the truth has the same
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(1, 1, 1), (7, 33, 3), (65, 130, 20), (40, 64, 130)]  # out, in, r
ALL = [*SIZES, *(pytest.param(size, marks=pytest.mark.gpu) for size in [(4096, 4096, 16), (4097, 11008, 384)])]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(size, dtype):
    out, width, r = size
    return (
        (randn(out, width, seed=1) / width**0.5).to(dtype),
        randn(r, width, seed=2) / width**0.5,
        randn(out, r, seed=3) / r**0.5,
    )


def error(found, weight, A, B):
    truth = reference.weight_norm(weight.double(), A.double(), B.double(), S)
    return ((found.double() - truth).abs() / truth).max().item()


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_dense(dtype, transposed, size):
    weight, A, B = problem(size, dtype)
    stored = weight.T.contiguous().T if transposed else weight
    found = subject.norm(stored, weight.double().square().sum(1).float(), A, B, S)
    assert found.dtype is FP32
    assert error(found, weight, A, B) <= 1e-6


@pytest.mark.parametrize("left", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_that_cancel(dtype, left):
    """W0 + s B A is a small rest of W0 in every third row."""
    weight, A, B = problem((50, 70, 4), dtype)
    rest = randn(50, 70, seed=4) / 70**0.5
    A[0] = weight[0].float()
    B[::3] = 0
    B[::3, 0] = -1 / S
    weight[::3] = (A[0] + left * rest[::3]).to(dtype)
    base = weight.double().square().sum(1).float()
    found = subject.norm(weight, base, A, B, S)
    # an element of the rest carries the rounding of what cancelled, 2^-24 of W0
    assert error(found, weight, A, B) <= 1e-6
    dense = weight.double() + S * B.double() @ A.double()
    assert ((dense.square().sum(1) < CANCELLATION * base)[::3]).all() or left > 0.25


def test_rows_of_nothing_have_no_norm():
    weight, A, B = problem((5, 9, 2), FP32)
    weight[2], B[2] = 0, 0
    assert subject.norm(weight, weight.square().sum(1), A, B, S)[2] == 0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_four_bits(dtype, quant_type, nested):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 37, bias=False, compute_dtype=dtype, quant_type=quant_type)
    layer.weight = bnb.nn.Params4bit(
        (randn(37, 64, seed=1) / 8).to(dtype).cpu(), quant_type=quant_type, compress_statistics=nested
    )
    layer = layer.to(DEVICE)
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize(DEVICE)
    weight = base_weight(layer, "layer")
    A, B = randn(3, 64, seed=2) / 8, randn(37, 3, seed=3)
    found = subject.norm(weight.stored(), weight.row_norms_squared(), A, B, S)
    assert error(found, weight.dense(), A, B) <= 1e-6
