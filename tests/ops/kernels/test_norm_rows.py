"""What the kernels of v are made of: sums of bits, how W0 is read and divided, and v of rows that programs share."""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP16, FP32, randn

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
import triton.language as tl

from dora_peft import reference
from dora_peft.bases import FourBit
from dora_peft.ops.kernels import norm
from dora_peft.ops.kernels import norm_rows as subject
from dora_peft.ops.kernels.elements import stored_arguments
from dora_peft.ops.kernels.norm_rows import BLOCK, ROWS, bits, conclude, division, mixed_sum, reads, sample_of
from dora_peft.ops.kernels.tuning import cdiv

# exact in binary, so that the truth has the same
S = 0.5


@triton.jit
def _mixed_sum(source, out, blocks, count, start, step, SIZE: tl.constexpr):
    for block in range(blocks):
        tl.store(out + block, mixed_sum(source, block, count, start, step, SIZE))


@triton.jit
def _conclude(known, found, base_due, compared):
    conclude(known, found, base_due != 0, compared)


@triton.jit
def _norm(
    weight, absmax, code, lora_A, lora_B, partial, arrived, out, base, spans, columns, height, width, rank, scaling,
    w_row, w_column, blocksize,
    READS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    value, rows, in_rows, last = subject_norm_of_rows(
        weight, absmax, code, lora_A, lora_B, partial, arrived, base, tl.program_id(0) // spans,
        tl.program_id(0) % spans, spans, columns, height, width, rank, scaling, w_row, w_column, blocksize, True,
        READS, FOUR_BIT, HALF, BRAIN, PRECISION, RANKS, WHOLE, ROWS, BLOCK, STAGES, 2.0**-23,
    )  # fmt: skip
    if last:
        tl.store(out + rows, value, in_rows)


subject_norm_of_rows = subject.norm_of_rows


def finalised(place, number):
    """MurmurHash3's fmix64 of both, by whole numbers without a limit."""
    word = (place << 32) ^ (number & 0xFFFFFFFF)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        word ^= word >> 33
        word = word * factor % 2**64
    return word ^ (word >> 33)


@pytest.mark.parametrize(("count", "start", "step"), [(64, 0, 1), (37, 0, 1), (100, 5, 3), (1, 2, 7)])
def test_sums_of_mixed_bits(count, start, step):
    numbers = randn(512).view(torch.int32)
    blocks = cdiv(count, 32)
    found = torch.zeros(blocks, dtype=torch.int64, device=DEVICE)
    _mixed_sum[(1,)](numbers, found, blocks, count, start, step, SIZE=32)
    chosen = numbers[start:][::step][:count].tolist()
    expected = sum(finalised(place, number) for place, number in enumerate(chosen)) % 2**64
    assert found.sum().item() % 2**64 == expected


@pytest.mark.parametrize("compared", [3, 4])
@pytest.mark.parametrize("base_due", [False, True])
def test_what_is_remembered_after_a_refresh(base_due, compared):
    known = torch.arange(100, 105, device=DEVICE)
    found = torch.arange(4, device=DEVICE)
    _conclude[(1,)](known, found, int(base_due), compared)
    # another W0 than that of the sum of all of it is not taken for it, which is off by one then
    whole = 3 if compared == 4 else 104 if base_due else 103
    assert known.tolist() == [0, 1, 2, whole, 105]


def four_bits(height, width, blocksize=64, dtype=BF16, offset=0):
    """As it is stored, and densely in fp64."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (height * width // 2 + offset,), generator=generator).to(torch.uint8)[offset:]
    absmax = 0.1 + torch.rand(height * width // blocksize, generator=generator)
    code = torch.linspace(-1, 1, 16)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).view(-1, blocksize).long()
    dense = (code[nibbles] * absmax[:, None]).to(dtype).double().view(height, width)
    on_device = torch.empty(len(packed) + offset, dtype=torch.uint8, device=DEVICE)[offset:].copy_(packed)
    return FourBit(on_device, absmax.to(DEVICE), code.to(DEVICE), blocksize, dtype, (height, width)), dense.to(DEVICE)


LAYOUTS = {
    "rows": lambda h, w, dtype: randn(h, w, dtype=dtype),
    "columns": lambda h, w, dtype: randn(w, h, dtype=dtype).T,
    "some columns of more": lambda h, w, dtype: randn(h, 2 * w, dtype=dtype)[:, w:],
    "one column later": lambda h, w, dtype: randn(h, w + 16, dtype=dtype)[:, 1 : w + 1],
    "one element later": lambda h, w, dtype: randn(h * w + 1, dtype=dtype)[1:].view(h, w),
    "some rows of columns": lambda h, w, dtype: randn(w, 2 * h, dtype=dtype)[:, h:].T,
    "every other column": lambda h, w, dtype: randn(h, 2 * w, dtype=dtype)[:, ::2],
}


def reads_at_once(weight):
    """Whether every 16 elements along it lie together and begin at 16 bytes."""
    height, width = weight.shape
    starts = [weight[i : i + 1, j : j + 16] for i in range(height) for j in range(0, width, 16)]
    return all(part.numel() == 16 and part.stride(1) == 1 and part.data_ptr() % 16 == 0 for part in starts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(64, 96), (33, 96), (64, 90), (16, 16), (48, 8)])
def test_a_weight_is_read_in_16_bytes_only_where_it_lies_so(shape, dtype, layout):
    weight = LAYOUTS[layout](*shape, dtype)
    found = reads(weight)
    along = {subject.ALONG_ROWS: weight, subject.ALONG_COLUMNS: weight.T}
    if found in along:
        assert reads_at_once(along[found])
    else:
        assert found == subject.ANY
    # and where it usually lies so, it is
    usual = {"rows": (1, subject.ALONG_ROWS), "columns": (0, subject.ALONG_COLUMNS)}
    if layout in usual and shape == (64, 96):
        assert found == usual[layout][1]


@pytest.mark.parametrize(
    ("width", "blocksize", "offset", "whole"),
    [(128, 64, 0, True), (128, 128, 0, True), (96, 64, 0, False), (128, 32, 0, False), (128, 64, 8, False)],
)
def test_nibbles_are_read_in_whole_quantisation_blocks_only(width, blocksize, offset, whole):
    assert reads(four_bits(8, width, blocksize, offset=offset)[0]) == (subject.NIBBLES if whole else subject.ANY)


@pytest.mark.parametrize("height", [1, 63, 64, 65, 1000, 4096, 14336, 128256])
def test_spans_cover_every_column_once(height):
    for width in [1, 63, 64, 65, 511, 512, 1000, 1024, 1040, 4096, 11008, 14336, 28672]:
        spans, columns = division(height, width)
        assert columns % BLOCK == 0
        assert (spans - 1) * columns < width <= spans * columns
        if spans > 1:
            # work enough in each, and no more of them than the processor needs
            assert columns >= 512
            assert (spans - 1) * cdiv(height, ROWS) < 264
    # a large layer fills the processor
    assert division(4096, 4096)[0] * cdiv(4096, ROWS) >= 264


def test_a_sample_lies_within_the_weight_and_all_over_it():
    for count in [1, 2, 1023, 1024, 1025, 2047, 2048, 3000, 4097, 10**6 + 3, 2**31 + 5]:
        # of the size alone
        taken, start, step = sample_of(torch.empty(count, dtype=torch.uint8, device="meta"))
        assert taken == min(1024, count)
        last = start + (taken - 1) * step
        assert 0 <= start <= last < count
        assert step >= 1
        assert last >= count // 2 - 1 or count == 2
        # rows of no usual width are met at the same column every time
        if count >= 4096:
            assert start % 2 == 1


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, torch.uint8])
def test_bits_are_the_same_memory(dtype):
    tensor = torch.arange(35).view(5, 7).to(dtype)
    for one, order in ((tensor, tensor), (tensor.T, tensor)):
        found = bits(one)
        assert found.data_ptr() == tensor.data_ptr()
        assert found.dtype.itemsize == dtype.itemsize
        assert not found.is_floating_point()
        assert torch.equal(found.view(dtype), order.reshape(-1))


def relative_error(found, dense, A, B):
    truth = reference.weight_norm(dense.double(), A.double(), B.double(), S)
    return ((found.double() - truth).abs() / truth).max().item()


WIDTH = 1088


@pytest.mark.parametrize("kind", ["rows", "columns", "any", "nibbles", "nibbles, any"])
@pytest.mark.parametrize(("height", "rank"), [(80, 3), (16, 40)])
def test_programs_that_share_rows_give_their_norms(height, kind, rank, monkeypatch):
    """In any order, of every way to read W0, also from one part of the columns into the next; ||W0||^2 beside them."""
    nibbles = {"nibbles": 0, "nibbles, any": 8}
    if kind in nibbles:
        stored, dense = four_bits(height, WIDTH, offset=nibbles[kind])
    else:
        layout = {"rows": "rows", "columns": "columns", "any": "one element later"}[kind]
        stored = dense = LAYOUTS[layout](height, WIDTH, BF16)
    how = {"rows": subject.ALONG_ROWS, "columns": subject.ALONG_COLUMNS, "nibbles": subject.NIBBLES}
    assert reads(stored) == how.get(kind, subject.ANY)
    A, B = randn(rank, WIDTH, seed=2) / 4, randn(height, rank, seed=3)
    spans, columns = division(height, WIDTH)
    blocks = cdiv(height, ROWS)
    assert spans > 1
    partial = torch.full((spans * height,), torch.nan, device=DEVICE)
    arrived = torch.zeros(blocks, dtype=torch.int32, device=DEVICE)
    found, base = (torch.full((height,), torch.nan, device=DEVICE) for _ in range(2))
    weight, absmax, code, layout, options = stored_arguments(stored, found)
    for _ in range(2):
        _norm[(blocks * spans,)](
            weight, absmax, code, A, B, partial, arrived, found, base, spans, columns, height, WIDTH, rank, S,
            *layout, **options, **subject.constants(stored, rank),
        )  # fmt: skip
        assert relative_error(found, dense, A, B) <= 1e-6
        assert ((base.double() / dense.double().square().sum(1)) - 1).abs().max() <= 1e-6
        # as the next call needs them
        assert not arrived.any()
        first = found.clone()
        found.fill_(torch.nan)
    norms = norm.row_norms(stored, base, A, B, S)
    assert torch.equal(norms, first)
