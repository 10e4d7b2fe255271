"""v of many layers in two launches: as the kernels of one layer compute it, and of no layer that is not due."""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP16, FP32, poisoned_memory, randn  # noqa: F401

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft import reference
from dora_peft.bases import base_weight
from dora_peft.ops.kernels import grouped_norm as subject
from dora_peft.ops.kernels.norm import Memory, checked_norm

S = 0.5
# out, in, r: alone, odd, several blocks of rows, two spans, ranks above those of one product
WIDE = (130, 1040, 16)
SIZES = [(1, 16, 1), (7, 32, 7), (65, 144, 16), WIDE, (40, 64, 33), (96, 80, 64), (33, 48, 130)]


def entry(size, dtype=FP32, factors=FP32, transposed=False, seed=0):
    out, width, r = size
    weight = (randn(out, width, seed=seed + 1) / width**0.5).to(dtype)
    weight = weight.T.contiguous().T if transposed else weight
    A, B = randn(r, width, seed=seed + 2) / width**0.5, randn(out, r, seed=seed + 3) / r**0.5
    return subject.Entry(Memory(out, weight.device), weight, A.to(factors), B.to(factors), S)


def primed(entries):
    """The group of entries whose memories know them, as a layer's own first check leaves them; and v of each."""
    values = [checked_norm(e.memory, e.stored, e.lora_A, e.lora_B, e.scaling, due=True, another=True) for e in entries]
    return subject.Group(entries), values


def parts(group):
    return group.check(0, False)


def counts(entries):
    """How often the device has computed each v."""
    return [int(e.memory.known[4]) for e in entries]


def error(found, e):
    weight = e.stored if isinstance(e.stored, torch.Tensor) else None
    truth = reference.weight_norm(weight.double(), e.lora_A.double(), e.lora_B.double(), e.scaling)
    return ((found.double() - truth).abs() / truth).max().item()


DTYPES = [(FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16)]
CASES = [(size, *dtypes, by_columns) for size in SIZES for dtypes in DTYPES for by_columns in (False, True)]
# several programs a row, which take seconds in the interpreter
CASES = [case for case in CASES if case[0] != WIDE or case[1:] in ((FP32, FP32, True), (BF16, FP32, False))]


@pytest.mark.parametrize(("size", "dtype", "factors", "transposed"), CASES)
def test_bit_for_bit_what_a_layer_computes_by_itself(size, dtype, factors, transposed):
    entries = [entry(size, dtype, factors, transposed, seed) for seed in (0, 10)]
    assert subject.groupable(entries[0].stored, entries[0].lora_A, entries[0].lora_B)
    assert subject.kind(entries[0]) == subject.kind(entries[1])
    group, _ = primed(entries)
    for e in entries:
        e.lora_B.mul_(1.5)
    found = parts(group)
    assert counts(entries) == [2, 2]
    for value, e in zip(found, entries, strict=True):
        assert error(value, e) <= 1e-6
        alone = checked_norm(Memory(len(value), value.device), e.stored, e.lora_A, e.lora_B, S, due=True, another=True)
        assert torch.equal(value, alone)


def change_two_signs(e):
    e.lora_B.view(-1)[:2].neg_()


CHANGES = {
    "A": lambda e: e.lora_A.mul_(1.5),
    "the last element of A": lambda e: e.lora_A.view(-1)[-1:].neg_(),
    "two signs of B": change_two_signs,
    "two rows of B": lambda e: e.lora_B.copy_(e.lora_B[[1, 0, *range(2, len(e.lora_B))]]),
    "W0": lambda e: e.stored.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_changes_one_layer_refreshes_that_layer_alone(dtype, change):
    sizes = [(65, 144, 16), (130, 1040, 16), (7, 32, 16)]
    entries = [entry(size, dtype, seed=10 * i) for i, size in enumerate(sizes)]
    group, first = primed(entries)
    again = parts(group)
    assert counts(entries) == [1, 1, 1]
    assert all(map(torch.equal, again, first))
    kept = [value.clone() for value in again]
    for number, e in enumerate(entries):
        before = counts(entries)
        CHANGES[change](e)
        found = parts(group)
        assert [after - old for after, old in zip(counts(entries), before, strict=True)] == [
            int(other == number) for other in range(3)
        ]
        assert error(found[number], e) <= 1e-6
        assert all(map(torch.equal, parts(group), found))
        # and the layer by itself agrees that nothing is due
        before = counts(entries)
        alone = checked_norm(e.memory, e.stored, e.lora_A, e.lora_B, S, due=False, another=False)
        assert torch.equal(alone, found[number])
        assert counts(entries) == before
    # what was handed out is never written again
    assert all(map(torch.equal, again, kept))


@pytest.mark.parametrize("programs", [1, 3])
def test_fewer_programs_than_blocks(programs, monkeypatch):
    monkeypatch.setattr(subject, "_PROGRAMS", programs)
    monkeypatch.setattr(subject, "_processors", lambda device: 1)
    entries = [entry((130, 1040, 16), seed=10 * i) for i in range(2)]
    group, first = primed(entries)
    assert group.blocks > programs
    assert all(map(torch.equal, parts(group), first))
    entries[1].lora_A.neg_()
    assert error(parts(group)[1], entries[1]) <= 1e-6
    assert counts(entries) == [1, 2]


def test_what_a_layer_computes_by_itself_the_group_knows():
    entries = [entry((65, 144, 16), seed=10 * i) for i in range(3)]
    group, _ = primed(entries)
    entries[1].lora_B.mul_(2)
    alone = checked_norm(
        entries[1].memory, entries[1].stored, entries[1].lora_A, entries[1].lora_B, S, due=False, another=False
    )
    assert counts(entries) == [1, 2, 1]
    assert torch.equal(parts(group)[1], alone)
    assert counts(entries) == [1, 2, 1]


def test_zero_rows_and_rows_that_vanish_are_floored():
    entries = [entry((70, 96, 4), seed=10 * i) for i in range(2)]
    for e in entries:
        e.stored[3], e.lora_B[3] = 0, 0
        e.lora_A[0], e.lora_B[5] = e.stored[5], 0
        e.lora_B[5, 0] = -1 / S
    group, first = primed(entries)
    for e in entries:
        e.lora_B[10] += 1
    for value, e, before in zip(parts(group), entries, first, strict=True):
        assert value[3] == torch.tensor(1e-30)
        # W0 + s B A is 0 there exactly, ||W0|| is not
        torch.testing.assert_close(value[5], e.stored[5].norm() * torch.finfo(FP32).eps, rtol=1e-6, atol=0)
        assert before[5] == value[5]


@pytest.mark.parametrize("width", [64, 192, 62])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_four_bits(dtype, nested, width):
    bnb = pytest.importorskip("bitsandbytes")
    entries, dense = [], []
    for seed in (0, 10):
        layer = bnb.nn.Linear4bit(width, 70, bias=False, compute_dtype=dtype, quant_type="nf4")
        data = (randn(70, width, seed=seed + 1) / 8).to(dtype).cpu()
        layer.weight = bnb.nn.Params4bit(data, quant_type="nf4", compress_statistics=nested)
        layer = layer.to(DEVICE)
        if layer.weight.quant_state is None:
            layer.weight = layer.weight._quantize(DEVICE)
        weight = base_weight(layer, "layer")
        A, B = randn(3, width, seed=seed + 2) / 8, randn(70, 3, seed=seed + 3)
        entries.append(subject.Entry(Memory(70, A.device), weight.stored(), A, B, S))
        dense.append(weight.dense())
    group, _ = primed(entries)
    assert counts(entries) == [1, 1]
    parts(group)
    assert counts(entries) == [1, 1]
    for e in entries:
        e.lora_A.neg_()
    for value, e, weight in zip(parts(group), entries, dense, strict=True):
        truth = reference.weight_norm(weight.double(), e.lora_A.double(), e.lora_B.double(), S)
        assert ((value - truth).abs() / truth).max() <= 1e-6
        alone = checked_norm(Memory(70, value.device), e.stored, e.lora_A, e.lora_B, S, due=True, another=True)
        assert torch.equal(value, alone)


def test_what_cannot_be_read_in_place_is_left_to_the_layer():
    e = entry((65, 144, 16))
    assert subject.groupable(e.stored, e.lora_A, e.lora_B)
    assert not subject.groupable(e.stored[:, ::2], e.lora_A, e.lora_B)
    assert not subject.groupable(e.stored, e.lora_A.T.contiguous().T, e.lora_B)
    assert not subject.groupable(e.stored, e.lora_A, e.lora_B.to(BF16))
    assert not subject.groupable(e.stored, e.lora_A.view(-1)[1:].clone()[3 : 3 + 144].view(1, 144), e.lora_B)


def test_layers_of_other_layouts_need_other_kernels():
    kinds = {subject.kind(entry((64, 64, 16), dtype)) for dtype in (FP32, BF16, FP16)}
    kinds |= {subject.kind(entry((64, 64, rank))) for rank in (16, 32, 64, 128)}
    kinds |= {subject.kind(entry((64, 64, 16), transposed=True)), subject.kind(entry((64, 63, 16)))}
    assert len(kinds) == 3 + 3 + 2
    # sizes are none
    assert subject.kind(entry((64, 64, 16))) == subject.kind(entry((4096, 128, 9), seed=5))
