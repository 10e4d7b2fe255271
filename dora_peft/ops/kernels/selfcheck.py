"""Each kernel once on little tensors, held to torch's own operations: what `auto` asks of a GPU that nobody has tried.

`run` is called by ops/selfcheck.py, once per device and dtype. A check is a function that is decorated with
`@checks(kernel, ...)`, and yields what a kernel gave beside what it should have given, in fp64; checking.py has what it
is made of. A test fails for a kernel without one, and for one whose check does not see that the kernel did nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...bases import FourBit
from . import dropout, grouped_norm, linear, norm, sample
from .checking import RANK, TOKENS, WIDTH, Problem, Result, checks, exact, run, run_each

__all__ = ["run", "run_each"]

S, P, SEED = 0.5, 0.3, 2**40 + 1
# v is computed with the precision of fp32 whatever W0's dtype is.
_NORM_TOLERANCE = 2.0**-13


@checks(linear._scaled_sum_of_few_ranks)
def scaled_sum(p: Problem) -> Iterator[Result]:
    z, u, B, c, bias = map(exact, (p.z, p.u, p.B, p.c, p.bias))
    in_place = p.place(p.z)
    linear.scaled_sum(in_place, p.u, p.B, p.c, p.bias, S, out=in_place)
    yield Result("y", in_place, c * (z - bias) + u @ (S * c[:, None] * B).T + bias)
    folded = p.place(p.B.to(p.dtype))
    y = linear.scaled_sum(p.z, p.u, folded, p.c, None, None, out=torch.empty_like(p.z))
    yield Result("y of evaluation", y, c * z + u @ exact(folded).T)


@checks(linear._scaled_sum_of_many_ranks)
def scaled_sum_of_many_ranks(p: Problem) -> Iterator[Result]:
    # of fp32 the kernel of few ranks takes these as well
    rank = linear.MANY_RANKS + RANK
    many, factor = p.random(TOKENS, rank), p.random(WIDTH, rank, scale=rank**-0.5, dtype=torch.float32)
    z, u, B, c, bias = map(exact, (p.z, many, factor, p.c, p.bias))
    y = linear.scaled_sum(p.z, many, factor, p.c, p.bias, S, out=torch.empty_like(p.z))
    yield Result("y", y, c * (z - bias) + u @ (S * c[:, None] * B).T + bias)


@checks(linear._scale_and_sum)
def scale_and_sum(p: Problem) -> Iterator[Result]:
    g, y, c, bias = map(exact, (p.g, p.y, p.c, p.bias))
    scaled, sums = linear.scale_and_sum(p.g, p.c, p.y, p.bias)
    assert sums is not None
    yield Result("c g", scaled, c * g)
    yield Result("sum g (y - b)", exact(sums).sum(0), (g * (y - bias)).sum(0))
    scaled, _ = linear.scale_and_sum(p.g, p.c, None, None)
    yield Result("c g without sums", scaled, c * g)


@checks(linear._magnitude_gradient)
def magnitude_gradient(p: Problem) -> Iterator[Result]:
    # In column 3 the bias drowns z, in column 5 c = 0: there, and wherever y was overwritten, it comes from x and W0.
    p.bias[3], p.c[5] = 1000.0, 0.0
    p.y[:, 3] = 1000.0
    g, x, y, u, B, c, bias = map(exact, (p.g, p.x, p.y, p.u, p.B, p.c, p.bias))
    by_token = g * (y - bias)
    sums = p.place(torch.stack([by_token[:40].sum(0), by_token[40:].sum(0)]).float())
    lost = torch.zeros(WIDTH, dtype=torch.bool, device="cpu")
    lost[[3, 5]] = True
    from_y = by_token.sum(0) / torch.where(lost, 1.0, c)
    four_bit, dense = p.four_bit()
    kept, gone = (p.place(torch.full((1,), n, dtype=torch.int32, device="cpu")) for n in (0, 1))
    for name, stored, weight in (("W0", p.weight, exact(p.weight)), ("4-bit W0", four_bit, dense)):
        from_x = (g * (x @ weight.T + S * u @ B.T)).sum(0)
        found = linear.magnitude_gradient(sums, p.g, p.y, p.x, stored, p.u, p.B, p.c, p.bias, S, kept)
        yield Result(f"dc over {name}", found, torch.where(lost, from_x, from_y))
        found = linear.magnitude_gradient(sums, p.g, p.y, p.x, stored, p.u, p.B, p.c, p.bias, S, gone)
        yield Result(f"dc over {name} without y", found, from_x)


def _mask(p: Problem, seed: int | Tensor) -> Tensor:
    return exact(dropout.drawn_mask(torch.Size((TOKENS, WIDTH)), seed, P, p.device))


@checks(dropout._add_low_rank)
def add_low_rank(p: Problem) -> Iterator[Result]:
    mask, du, A = _mask(p, SEED), exact(p.du), exact(p.A)
    kept = mask.mean()
    yield Result("the mask", mask, (mask > 0.5).double())
    yield Result("the part that dropout keeps", kept, torch.full_like(kept, 1 - P), 0.05)
    on_device = p.place(torch.full((1,), SEED, dtype=torch.int64, device="cpu"))
    yield Result("the mask of a seed on the device", _mask(p, on_device), mask)
    # two masks differ where one drops and the other does not
    differing = (_mask(p, SEED + 1) != mask).double().mean()
    yield Result("the difference of two masks", differing, torch.full_like(differing, 2 * P * (1 - P)), 0.2)
    dx = p.place(p.x)
    dropout.add_low_rank(dx, p.du, p.A, SEED, P)
    yield Result("dx + mask * (du A)", dx, exact(p.x) + mask * (du @ A))


@checks(dropout._dropped_product)
def dropped_product(p: Problem) -> Iterator[Result]:
    expected = (_mask(p, SEED) * exact(p.x)) @ exact(p.A).T
    yield Result("(mask * x) A^T", dropout.dropped_product(p.x, p.A, SEED, P), expected)


@checks(dropout._dropped_gradient)
def dropped_gradient(p: Problem) -> Iterator[Result]:
    expected = exact(p.du).T @ (_mask(p, SEED) * exact(p.x))
    yield Result("du^T (mask * x)", dropout.dropped_gradient(p.du, p.x, SEED, P, p.A.dtype), expected)


class _Layer(NamedTuple):
    """What v is computed from: W0 of some kind, the same in fp64, A and B."""

    name: str
    stored: Tensor | FourBit
    weight: Tensor
    A: Tensor
    B: Tensor


def _layers(p: Problem) -> Iterator[_Layer]:
    # a row that cancels s B A but for a hundredth
    p.weight[7] = (0.01 * p.weight[7].float() - S * p.B[7] @ p.A).to(p.dtype)
    yield _Layer("W0", p.weight, exact(p.weight), p.A, p.B)
    yield _Layer("4-bit W0", *p.four_bit(), p.A, p.B)
    # so wide that several programs share its rows, of which the last adds up
    height, width = 5, 1040
    wide, A = (
        p.random(n, width, scale=width**-0.5, dtype=dtype) for n, dtype in ((height, p.dtype), (RANK, p.A.dtype))
    )
    yield _Layer("a wide W0", wide, exact(wide), A, p.random(height, RANK, scale=RANK**-0.5, dtype=p.B.dtype))


def _relative(name: str, found: Tensor, layer: _Layer) -> Result:
    """v of each row as a part of what it should be: those that cancel are small."""
    expected = torch.linalg.vector_norm(layer.weight + S * exact(layer.B) @ exact(layer.A), dim=1)
    return Result(f"{name} over {layer.name}", exact(found) / expected, torch.ones_like(expected), _NORM_TOLERANCE)


@checks(norm._norm)
def row_norms(p: Problem) -> Iterator[Result]:
    for layer in _layers(p):
        squared = p.place(layer.weight.square().sum(1).float())
        yield _relative("v", norm.row_norms(layer.stored, squared, layer.A, layer.B, S), layer)


def _numbers(layer: _Layer) -> Tensor:
    """Other than v: what is remembered shows in what is handed out."""
    return torch.arange(1, len(layer.B) + 1, device="cpu").double()


@checks(norm._checked_norm, norm._digest)
def checked_norm(p: Problem) -> Iterator[Result]:
    for layer in _layers(p):
        memory, remembered = norm.Memory(len(layer.B), p.device), _numbers(layer)

        def checked(due: bool, another: bool) -> Tensor:
            return norm.checked_norm(memory, layer.stored, layer.A, layer.B, S, due=due, another=another)  # noqa: B023

        yield _relative("the first v", checked(True, True), layer)
        memory.remembered.copy_(remembered)
        yield Result(f"what is remembered over {layer.name}", checked(False, False), remembered)
        layer.A[3, 5] += 1
        yield _relative("v after a change of A", checked(False, False), layer)
        yield _relative("v kept after it", checked(False, True), layer)


@checks(grouped_norm._check_all, grouped_norm._refresh_all)
def grouped_norms(p: Problem) -> Iterator[Result]:
    for layer in _layers(p):
        # two layers over the same W0
        layers = [layer._replace(A=p.place(layer.A)) for _ in range(2)]
        memories = [norm.Memory(len(layer.B), p.device) for _ in layers]
        group = grouped_norm.Group(
            [grouped_norm.Entry(m, one.stored, one.A, one.B, S) for m, one in zip(memories, layers, strict=True)]
        )
        for one, found in zip(layers, group.check(0, False), strict=True):
            yield _relative("the first v", found, one)
        remembered = _numbers(layer)
        for memory in memories:
            memory.remembered.copy_(remembered)
        for found in group.check(0, False):
            yield Result(f"what is remembered over {layer.name}", found, remembered)
        layers[1].A[3, 5] += 1
        first, second = group.check(0, False)
        yield Result(f"what is remembered beside a change over {layer.name}", first, remembered)
        yield _relative("v after a change of A", second, layers[1])
        memories[1].remembered.copy_(remembered)
        yield Result(f"what is remembered after it over {layer.name}", group.check(0, False)[1], remembered)


@checks(sample._take_sample, sample._compare_sample)
def samples(p: Problem) -> Iterator[Result]:
    y, (offset, start, step, size, count) = exact(p.y).flatten(), (WIDTH * 3, 2, WIDTH + 1, WIDTH * 2, TOKENS - 5)
    rows, diagonal = sample.take_sample(p.y, offset, start, step, size, count)
    yield Result("the rows", rows, y[offset : offset + size], 0.0)
    yield Result("the diagonal", diagonal, y[start : start + step * count : step], 0.0)
    whole = p.place(torch.empty(sample.sample_size(size, count, p.dtype), dtype=p.dtype, device="cpu").fill_(torch.nan))
    sample.keep_sample(p.y, whole, offset, start, step, size, count)
    for place, differs in (None, 0.0), (offset, 1.0):
        changed = p.place(p.y)
        if place is not None:
            changed.view(-1)[place] += 1
        sample.find_change(changed, whole, offset, start, step, size)
        gone = exact(sample.changed(whole))
        yield Result(f"whether {place} changed, in one piece", gone + 1, torch.full_like(gone, differs + 1), 0.0)
    for place, differs in (None, 0.0), (offset + size - 1, 1.0), (start + step * (count - 1), 1.0), (0, 0.0):
        changed = p.place(p.y)
        if place is not None:
            changed.view(-1)[place] += 1
        gone = sample.compare_sample(changed, rows, diagonal, offset, start, step)
        # beside 1, by which it is divided
        yield Result(f"whether {place} changed", exact(gone) + 1, torch.full_like(exact(gone), differs + 1), 0.0)
