"""The kernel that refreshes v, against the float64 reference: on a GPU or in Triton's interpreter."""

import platform

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft import reference
from dora_peft.bases import base_weight
from dora_peft.ops.constants import CANCELLATION
from dora_peft.ops.kernels import norm as subject

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# exact in binary, so that the truth has the same
S = 0.5
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# out, in, r
SIZES = [(1, 1, 1), (7, 33, 3), (65, 130, 20), (40, 64, 130)]
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
    found = subject.row_norms(stored, weight.double().square().sum(1).float(), A, B, S)
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
    found = subject.row_norms(weight, base, A, B, S)
    # an element of the rest carries the rounding of what cancelled, 2^-24 of W0
    assert error(found, weight, A, B) <= 1e-6
    dense = weight.double() + S * B.double() @ A.double()
    assert ((dense.square().sum(1) < CANCELLATION * base)[::3]).all() or left > 0.25


def test_rows_of_nothing_have_no_norm():
    weight, A, B = problem((5, 9, 2), FP32)
    weight[2], B[2] = 0, 0
    assert subject.row_norms(weight, weight.square().sum(1), A, B, S)[2] == 0


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
    found = subject.row_norms(weight.stored(), weight.row_norms_squared(), A, B, S)
    assert error(found, weight.dense(), A, B) <= 1e-6


def checked(memory, weight, A, B, due=False, another=False, scaling=S):
    """v as the kernels give it, and how often they computed it."""
    found = subject.checked_norm(memory, weight, A, B, scaling, due=due, another=another)
    return found, int(memory.known[4])


CHANGES = {
    "A": lambda weight, A, B: A.mul_(1.5),
    "one sign of A": lambda weight, A, B: A.view(-1)[:1].neg_(),
    "two signs of B": lambda weight, A, B: B.view(-1)[:2].neg_(),
    "signs far apart": lambda weight, A, B: B[:: len(B) - 1].neg_(),
    "all signs of B": lambda weight, A, B: B.neg_(),
    "two rows of B": lambda weight, A, B: B.copy_(B[[1, 0, *range(2, len(B))]]),
    "two places of A": lambda weight, A, B: A.copy_(A[:, [1, 0, *range(2, A.shape[1])]]),
    "W0": lambda weight, A, B: weight.mul_(2),
    "signs of W0": lambda weight, A, B: weight.neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("factors", [FP32, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_device_tells_whether_v_is_due(dtype, factors, change):
    weight, A, B = problem((65, 130, 20), dtype)
    A, B = A.to(factors), B.to(factors)
    memory = subject.Memory(65, weight.device)
    first, count = checked(memory, weight, A, B, due=True, another=True)
    assert count == 1
    # another tensor of the same content
    assert checked(memory, weight.clone(), A, B, another=True)[1] == 1
    assert error(first, weight, A, B) <= 1e-6
    again, count = checked(memory, weight, A, B)
    assert count == 1
    assert torch.equal(again, first)
    # a graph may hold either
    assert again.data_ptr() != first.data_ptr() != memory.remembered.data_ptr()
    kept = first.clone()
    CHANGES[change](weight, A, B)
    found, count = checked(memory, weight, A, B)
    assert count == 2
    assert error(found, weight, A, B) <= 1e-6
    assert torch.equal(first, kept)
    assert checked(memory, weight, A, B)[1] == 2
    assert checked(memory, weight, A, B, due=True)[1] == 3
    checked(memory, weight, A, B, another=True)
    before = int(memory.known[4])
    other = weight.clone()
    # in no sample
    other[40, 77] += 1
    assert checked(memory, other, A, B, another=True)[1] == before + 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_checked_norms_of_any_size(transposed, size):
    weight, A, B = problem(size, FP32)
    stored = weight.T.contiguous().T if transposed else weight
    memory = subject.Memory(size[0], weight.device)
    found, _ = checked(memory, stored, A, B, due=True)
    assert error(found, weight, A, B) <= 1e-6
    weight.zero_()
    stored.zero_()
    B.zero_()
    # floored
    assert (checked(memory, stored, A, B)[0] == torch.tensor(1e-30)).all()


def test_the_sum_of_all_of_w0_belongs_to_what_is_remembered():
    """A weight that was edited in place comes back as another tensor of its first content."""
    weight, A, B = problem((65, 130, 20), FP32)
    memory, original = subject.Memory(65, weight.device), weight.clone()
    checked(memory, weight, A, B, due=True, another=True)
    weight[40, 77] += 10
    checked(memory, weight, A, B, due=True)
    found, _ = checked(memory, original, A, B, another=True)
    assert error(found, original, A, B) <= 1e-6
