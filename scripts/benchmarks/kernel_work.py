"""What a launch of each Triton kernel moves and multiplies, counted from its arguments: for the table of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import triton
from torch import Tensor

from dora_peft.ops.kernels import norm

from .kernel_examples import Case, Launch

Numbers = dict[str, int]
# What the memory hands out at once: an element that is alone there costs as much.
SECTOR = 32


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        ideal: Bytes that it cannot do without: each input read once, each output written once.
        asked: Bytes that its programs ask for; those of them that are asked for again mostly come from the L2 cache.
        flops: Of its matrix products.
        iterations: How often a program goes through its main loop.
        blocks: What the programs take one after another, if they do: a loop around the main one.
        branches: Of how many of equal length a program takes one.
    """

    ideal: int
    asked: int
    flops: int
    iterations: int
    blocks: int = 0
    branches: int = 1


def work(launch: Launch, config: triton.Config) -> Work | None:
    """What a launch does; None if nobody counted it."""
    count, together = (counts.get(launch.function.__name__) for counts in (WORK, WORK_OF_ALL))
    if count is None and together is None:
        return None
    numbers = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
    sizes = {name: value.element_size() for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    numbers |= config.kwargs
    return count(numbers, sizes) if count else together(launch.case.layers(), numbers, sizes)


def _compose(n: Numbers, size: Numbers) -> Work:
    tensors = 2 * n["length"] * n["width"] * size["z"]
    u, factor = n["length"] * n["rank"] * size["u"], n["width"] * n["rank"] * size["lora_B"]
    vectors = n["width"] * (size["c"] + n["HAS_BIAS"] * size["bias"])
    across, down = triton.cdiv(n["width"], n["COLUMNS"]), triton.cdiv(n["length"], n["ROWS"])
    asked = tensors + across * u + down * (factor + vectors)
    flops = 2 * n["length"] * n["width"] * n["rank"]
    return Work(tensors + u + factor + vectors, asked, flops, triton.cdiv(n["rank"], n["RANKS"]))


def _scale(n: Numbers, size: Numbers) -> Work:
    tensors = (2 + n["SUM"]) * n["length"] * n["width"] * size["g"]
    vectors = n["width"] * (size["c"] + n["HAS_BIAS"] * size["bias"])
    stripes = triton.cdiv(n["length"], n["stripe"])
    sums = n["SUM"] * stripes * n["width"] * size["sums"]
    iterations = triton.cdiv(n["stripe"], n["ROWS"])
    return Work(tensors + vectors + sums, tensors + stripes * vectors + sums, 0, iterations)


def _magnitude(n: Numbers, size: Numbers) -> Work:
    """Where no column was lost, as in training that goes well."""
    sample = n["HAS_BIAS"] * n["width"] * (size["bias"] + min(n["SAMPLE"], n["length"]) * size["y"])
    total = n["width"] * (n["stripes"] * size["sums"] + size["c"] + size["out"]) + sample
    return Work(total, total, 0, 1)


def _dropped_product(n: Numbers, size: Numbers) -> Work:
    x, out = n["length"] * n["features"] * size["x"], n["length"] * n["rank"] * size["out"]
    factor = n["rank"] * n["features"] * size["lora_A"]
    asked = triton.cdiv(n["rank"], n["RANKS"]) * x + triton.cdiv(n["length"], n["ROWS"]) * factor + out
    flops = 2 * n["length"] * n["features"] * n["rank"]
    return Work(x + factor + out, asked, flops, triton.cdiv(n["features"], n["BLOCK"]))


def _add_low_rank(n: Numbers, size: Numbers) -> Work:
    tensors = (1 + n["ADD"]) * n["length"] * n["features"] * size["out"]
    du, factor = n["length"] * n["rank"] * size["du"], n["rank"] * n["features"] * size["lora_A"]
    across, down = triton.cdiv(n["features"], n["BLOCK"]), triton.cdiv(n["length"], n["ROWS"])
    flops = 2 * n["length"] * n["features"] * n["rank"]
    return Work(tensors + du + factor, tensors + across * du + down * factor, flops, triton.cdiv(n["rank"], n["RANKS"]))


def _dropped_gradient(n: Numbers, size: Numbers) -> Work:
    x, du = n["length"] * n["features"] * size["x"], n["length"] * n["rank"] * size["du"]
    out = n["rank"] * n["features"] * size["out"]
    parts = triton.cdiv(n["length"], n["stripe"]) * out
    asked = triton.cdiv(n["rank"], n["RANKS"]) * x + triton.cdiv(n["features"], n["BLOCK"]) * du + parts
    flops = 2 * n["length"] * n["features"] * n["rank"]
    return Work(x + du + out, asked, flops, triton.cdiv(n["stripe"], n["ROWS"]))


def _norm(n: Numbers, size: Numbers) -> Work:
    """Of a check, where v is due and W0 is the same."""
    count, rows = n["height"] * n["width"], triton.cdiv(n["height"], n["ROWS"])
    # half a byte an element and a statistic for each block of them
    weight = count // 2 + count // n["blocksize"] * size["absmax"] if n["FOUR_BIT"] else count * size["weight"]
    A, B = n["rank"] * n["width"] * size["lora_A"], n["height"] * n["rank"] * size["lora_B"]
    # of a check also ||W0||^2 and what is remembered
    out = n["height"] * (size["out"] + size.get("base", 0) + size.get("remembered", 0))
    partial = 2 * n["spans"] * n["height"] * size["partial"] if n["spans"] > 1 else 0
    asked = weight + rows * A + n["spans"] * B + out + partial
    return Work(weight + A + B + out, asked, 2 * count * n["rank"], triton.cdiv(n["columns"], n["BLOCK"]))


def _digest(n: Numbers, size: Numbers) -> Work:
    """A and B whole, and the sample of W0."""
    factors = n["count_A"] * size["lora_A"] + n["count_B"] * size["lora_B"]
    sums = 3 * size["sums"]
    ideal = factors + n["count_W"] * size["weight"] + sums
    return Work(ideal, factors + n["count_W"] * _apart(n["step"], size["weight"]) + sums, 0, 1, branches=3)


def _take_sample(n: Numbers, size: Numbers) -> Work:
    """Each element is read and written."""
    ideal = 2 * (n["size"] + n["count"]) * size["y"]
    return Work(ideal, ideal + n["count"] * (_apart(n["step"], size["y"]) - size["y"]), 0, 1)


def _compare_sample(n: Numbers, size: Numbers) -> Work:
    """Each element is read from both."""
    done = _take_sample(n, size)
    return Work(done.ideal + size["gone"], done.asked + size["gone"], 0, 1)


def _apart(step: int, size: int) -> int:
    """Bytes that come with an element of `size` bytes, where elements are `step` apart."""
    return min(step * size, SECTOR)


WORK: dict[str, Callable[[Numbers, Numbers], Work]] = {
    "_scaled_sum": _compose,
    "_scale_and_sum": _scale,
    "_magnitude_gradient": _magnitude,
    "_dropped_product": _dropped_product,
    "_add_low_rank": _add_low_rank,
    "_dropped_gradient": _dropped_gradient,
    "_norm": _norm,
    "_checked_norm": _norm,
    "_digest": _digest,
    "_take_sample": _take_sample,
    "_compare_sample": _compare_sample,
}


def _refresh_all(layers: list[Case], n: Numbers, size: Numbers) -> Work:
    """Where v of all layers is due and W0 is the same."""
    fp32 = dict.fromkeys(("absmax", "out", "base", "remembered", "partial"), 4)
    size = {**size, **fp32, "weight": size["like_W"], "lora_A": size["like_A"], "lora_B": size["like_A"]}
    total, iterations, blocks = [0, 0, 0], 0, 0
    for layer in layers:
        spans, columns = norm.division(layer.out, layer.features)
        shape = {"height": layer.out, "width": layer.features, "rank": layer.rank, "spans": spans, "columns": columns}
        done = _norm({**n, **shape, "blocksize": layer.stored.blocksize if layer.four_bit else 1}, size)
        total = [a + b for a, b in zip(total, (done.ideal, done.asked, done.flops), strict=True)]
        here = triton.cdiv(layer.out, n["ROWS"]) * spans
        iterations, blocks = iterations + here * done.iterations, blocks + here
    return Work(*total, triton.cdiv(iterations, blocks), blocks)


def _check_all(layers: list[Case], n: Numbers, size: Numbers) -> Work:
    """A and B whole, and the sample of W0, whose elements lie far apart."""
    factors = sum((layer.A.numel() + layer.B.numel()) * size["like_A"] for layer in layers)
    taken = len(layers) * n["SAMPLE"] * (2 if n["FOUR_BIT"] else 1)
    smallest = min(size["like_W"], size["like_S"]) if n["FOUR_BIT"] else size["like_W"]
    return Work(factors + taken * smallest, factors + taken * SECTOR, 0, 1, branches=3)


# Of kernels that take many layers.
WORK_OF_ALL: dict[str, Callable[[list[Case], Numbers, Numbers], Work]] = {
    "_refresh_all": _refresh_all,
    "_check_all": _check_all,
}
