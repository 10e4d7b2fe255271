"""Whether a tensor still holds what it held: bits of factors, samples and digests of weights."""

import copy
import itertools

import pytest
import torch
from torch import nn

from dora_peft.ops import content
from dora_peft.ops.content import Bits, Fingerprint, digest, same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["memcmp", "torch"])
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(content, "MEMCMP", None)
    elif content.MEMCMP is None:
        pytest.skip("this system gives no memcmp")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def flip(tensor, *places):
    """Another sign at these places of the flattened tensor."""
    tensor.view(-1)[list(places)] = -tensor.view(-1)[list(places)]


def swap(tensor, one, other):
    flat = tensor.view(-1)
    flat[[one, other]] = flat[[other, one]]


PER_WORD = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 4, torch.float16: 4}


def changes(dtype):
    """What plain sums, odd-weighted sums, and folds by a logical shift overlook, at every position of a word."""
    size = PER_WORD[dtype]
    for place in range(size):
        yield f"one sign at {place}", lambda t, p=place: flip(t, p)
    for one, other in itertools.product(range(size), repeat=2):
        yield f"two signs at {one}, {other}", lambda t, a=one, b=other: flip(t, a, size + b)
        yield f"two signs far apart at {one}, {other}", lambda t, a=one, b=other: flip(t, a, 40 * size + b)
        yield f"swapped {one}, {other}", lambda t, a=one, b=other: swap(t, a, size + b)
    for one, other in itertools.combinations(range(size), 2):
        yield f"swapped in a word {one}, {other}", lambda t, a=one, b=other: swap(t, a, b)
    yield "all signs in two words", lambda t: flip(t, *range(2 * size))
    yield "a row negated", lambda t: t[1].neg_()
    yield "two rows negated", lambda t: t[:2].neg_()
    yield "all negated", lambda t: t.neg_()
    yield "two rows swapped", lambda t: t.copy_(t[[1, 0, *range(2, len(t))]])
    yield "the smallest step of the last element", lambda t: t.view(-1)[-1:].mul_(1 + torch.finfo(t.dtype).eps)


CHANGES = [pytest.param(dtype, change, id=f"{dtype}-{name}") for dtype in DTYPES for name, change in changes(dtype)]


@pytest.mark.parametrize(("dtype", "change"), CHANGES)
def test_every_change_is_seen(dtype, change):
    tensor = random(12, 16, dtype=dtype)
    bits, before = Bits(tensor), digest(tensor)
    assert bits.fits(tensor)
    assert bits.fits(tensor.clone())
    assert digest(tensor.clone()) == before
    change(tensor)
    assert not bits.fits(tensor)
    assert digest(tensor) != before


@pytest.mark.parametrize(("dtype", "change"), CHANGES)
def test_every_change_is_seen_by_torch(dtype, change, monkeypatch):
    """Where C's memcmp is not to be had."""
    monkeypatch.setattr(content, "MEMCMP", None)
    tensor = random(12, 16, dtype=dtype)
    bits = Bits(tensor)
    assert bits.fits(tensor)
    change(tensor)
    assert not bits.fits(tensor)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (7, 9), (65537,), (300, 513)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int8])
def test_digests_of_any_size(dtype, shape):
    tensor = (100 * random(*shape)).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    for place in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else ():
        other = tensor.clone()
        other.view(-1)[place] = other.view(-1)[place] + 1
        assert digest(other) != digest(tensor)
    longer = torch.cat([tensor.reshape(-1), torch.zeros(8, dtype=dtype)])
    assert digest(longer) != digest(tensor)


def test_a_digest_is_of_the_content_alone():
    whole = random(33, 8)
    # at another alignment
    assert digest(whole[1:]) == digest(whole[1:].clone())
    assert digest(whole.T) == digest(whole.T.contiguous())


def test_what_is_compared(library):
    one = random(4, 6)
    bits = Bits(nn.Parameter(one))
    assert bits.fits(nn.Parameter(one.clone()))
    # other strides
    assert bits.fits(one.T.contiguous().T)
    for other in (one.double(), one.view(6, 4), one[:3], one + 1):
        assert not bits.fits(other)
    nan = torch.full((3,), torch.nan)
    assert Bits(nan).fits(nan.clone())
    assert not Bits(torch.zeros(3)).fits(-torch.zeros(3))
    assert same_bits(one, one.clone())
    assert not same_bits(one, one.double())
    assert not same_bits(one, -one)


def weight(size=(96, 80)):
    return nn.Parameter(random(*size), requires_grad=False)


@pytest.mark.parametrize("size", [(12, 10), (96, 80), (3, 5000)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_weight_fits_itself_and_copies(size, layout):
    one = weight(size)
    if layout == "columns":
        one = nn.Parameter(one.T.contiguous().T, requires_grad=False)
    fingerprint = Fingerprint(one)
    for _ in range(3):
        assert fingerprint.fits(one)
    twin = nn.Parameter(one.clone(), requires_grad=False)
    for _ in range(3):
        # sharding and offloading give another tensor each time
        assert fingerprint.fits(twin)
        twin = nn.Parameter(twin.clone(), requires_grad=False)
        assert fingerprint.fits(twin)


WRITES = {
    "in place": lambda w: w.mul_(2),
    "one element in place": lambda w: w.view(-1)[77].add_(1),
    "all through .data": lambda w: w.data.mul_(2),
    "all signs through .data": lambda w: w.data.neg_(),
    "bound to new memory": lambda w: setattr(w, "data", w.data * 2),
    "another dtype": lambda w: setattr(w, "data", w.data.double()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("size", [(12, 10), (96, 80)])
def test_a_written_weight_does_not_fit(size, write):
    one = weight(size)
    fingerprint = Fingerprint(one)
    assert fingerprint.fits(one)
    WRITES[write](one)
    assert not fingerprint.fits(one)


def test_another_weight_does_not_fit_where_the_sample_is_the_same():
    one = weight()
    fingerprint = Fingerprint(one)
    seen = {int(place) for place in content._elements(torch.arange(one.numel()))}
    hidden = next(place for place in range(one.numel()) if place not in seen)
    other = nn.Parameter(one.clone(), requires_grad=False)
    other.view(-1)[hidden] += 1
    assert not fingerprint.fits(other)
    # what is left to `refresh`
    one.data.view(-1)[hidden] += 1
    assert fingerprint.fits(one)


def test_a_small_weight_is_compared_in_full():
    one = weight((12, 10))
    for place in range(one.numel()):
        fingerprint = Fingerprint(one)
        one.data.view(-1)[place] += 1
        assert not fingerprint.fits(one)


def test_a_fingerprint_keeps_no_weight_alive_that_moves():
    one = weight()
    fingerprint = Fingerprint(one)
    assert fingerprint.fits(one)
    fingerprint.let_go()
    assert fingerprint.view is None
    assert fingerprint.fits(one)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(fingerprint)


def test_weights_without_a_version_or_memory():
    with torch.inference_mode():
        one = torch.randn(96, 80)
    fingerprint = Fingerprint(one)
    assert fingerprint.fits(one)
    with torch.inference_mode():
        one.mul_(2)
    assert not fingerprint.fits(one)
    meta = torch.empty(3, 4, device="meta")
    assert Fingerprint(meta).fits(meta)
    # offloaded: the same content comes back
    assert fingerprint.fits(torch.empty(96, 80, device="meta"))
    module = nn.Linear(3, 4)
    assert Fingerprint(module).fits(module)
    assert not Fingerprint(module).fits(nn.Linear(3, 4))
