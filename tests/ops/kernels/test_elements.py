"""What kernels are made of, in little kernels of its own: products, rounding, and the elements of a stored W0."""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP16, FP32, ROUNDING, randn

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
import triton.language as tl

from dora_peft.bases import FourBit
from dora_peft.ops.kernels import elements as subject
from dora_peft.ops.kernels.elements import dot, elements, narrow, stored_arguments


@triton.jit
def _dot(left, right, total, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    found = dot(
        tl.load(left + m[:, None] * K + k[None, :]),
        tl.load(right + k[:, None] * N + n[None, :]),
        tl.load(total + m[:, None] * N + n[None, :]),
        PRECISION,
    )
    tl.store(out + m[:, None] * N + n[None, :], found)


@triton.jit
def _narrow(source, out, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, narrow(tl.load(source + place), DTYPE))


@triton.jit
def _elements(
    weight, absmax, code, out, height, width, w_row, w_column, blocksize,
    FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    found = elements(weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN)
    tl.store(out + rows[:, None] * COLUMNS + columns[None, :], found)


@pytest.mark.parametrize(("left", "right"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)])
def test_a_product_is_summed_in_fp32_with_the_right_side_rounded_to_the_dtype_of_the_left(left, right):
    m, k, n = 16, 64, 32
    x, y, total = randn(m, k, dtype=left), randn(k, n, dtype=right, seed=1), randn(m, n, seed=2)
    found = torch.full((m, n), torch.nan, device=DEVICE)
    _dot[(1,)](x, y, total, found, m, k, n, "ieee")
    expected = total.double() + x.double() @ y.to(left).double()
    assert (found.double() - expected).norm() <= ROUNDING[FP32] * expected.norm()


def hard_to_round():
    """All halfway between neighbours in bf16 or just beside it, of either sign, beside ordinary numbers."""
    even = (randn(256).to(BF16).float().view(torch.int32) & -0x20000) | 0x8000
    near = torch.cat([even - 1, even, even + 1, even + 0x10000]).view(FP32)
    zeros = torch.zeros(8, device=DEVICE)
    return torch.cat([near, -near, zeros, -zeros, randn(2048 - 16, seed=1)])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_numbers_are_rounded_as_torch_rounds(dtype):
    source = hard_to_round()
    found = torch.empty(len(source), dtype=dtype, device=DEVICE)
    _narrow[(1,)](source, found, {FP32: tl.float32, BF16: tl.bfloat16, FP16: tl.float16}[dtype], len(source))
    assert torch.equal(found, source.to(dtype))


ROWS, COLUMNS = 8, 32


def read(stored):
    """[ROWS, COLUMNS] by `elements`, 0 beyond the weight."""
    out = torch.full((ROWS, COLUMNS), torch.nan, device=DEVICE)
    weight, absmax, code, layout, options = stored_arguments(stored, out)
    _elements[(1,)](weight, absmax, code, out, *stored.shape, *layout, **options, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


def padded(dense):
    expected = torch.zeros(ROWS, COLUMNS, device=DEVICE)
    expected[: dense.shape[0], : dense.shape[1]] = dense
    return expected


LAYOUTS = {
    "rows": lambda w: w,
    "columns": lambda w: w.T.contiguous().T,
    "some columns of more": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "every other row": lambda w: w.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_elements_of_a_dense_weight(dtype, layout):
    weight = randn(7, 30, dtype=dtype)
    assert torch.equal(read(LAYOUTS[layout](weight)), padded(weight.float()))


@pytest.mark.parametrize("blocksize", [2, 8, 64])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_elements_of_four_bits(dtype, blocksize):
    """Rows that begin within a quantisation block, and every nibble."""
    height, width = 8, 24
    packed = torch.arange(height * width // 2).mul(83).to(torch.uint8)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    assert nibbles.unique().numel() == 16
    absmax = 0.1 + torch.rand(height * width // blocksize, generator=torch.Generator().manual_seed(0))
    code = torch.linspace(-1, 1, 16)
    dense = (code[nibbles].view(-1, blocksize) * absmax[:, None]).to(dtype).float().view(height, width)
    stored = FourBit(*(t.to(DEVICE) for t in (packed, absmax, code)), blocksize, dtype, (height, width))
    assert torch.equal(read(stored), padded(dense.to(DEVICE)))


def test_what_is_not_read_is_stood_for():
    unused = torch.empty(0)
    weight = randn(3, 5).T
    given, absmax, code, layout, options = subject.stored_arguments(weight, unused)
    assert given is weight
    assert absmax is unused
    assert code is unused
    assert layout[:2] == weight.stride()
    assert not any(options.values())
