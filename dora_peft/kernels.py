"""Triton kernels of the linear layer, and their launchers. fused.py makes a layer of them.

    compose             y = c * (z - b) + u (s c B)^T + b, over z in place
    scale_and_sum       g' = c * g, and sum_n g (y - b) a stripe of tokens at a time
    magnitude_gradient  dc from those sums, and exactly where y does not tell z
    dropped_product     drop(x) A^T
    add_low_rank        dx + mask * (du A), in place
    dropped_gradient    du^T drop(x)

Each is one pass over its [N, features] tensors, with fp32 accumulation; the sums over tokens are made in two stages, so
that every result is deterministic. Nothing here synchronises with the host: what depends on values is decided inside
the kernels. The dropout mask is drawn anew from its seed wherever it is needed, and never stored.

This module imports Triton; import it through `functional.kernels`. With TRITON_INTERPRET=1 in the environment before
Triton is first imported, the kernels run on the CPU in Triton's interpreter, which is how the tests run them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base_weight import FourBit
from .choice import interpreted
from .linear import _DROWNED, _TINY

INTERPRETED = interpreted()
# Tokens that tell whether the bias drowns a column: half of them, since the first is often far larger than the others.
_SAMPLE = 64


def _tuned(keys: list[str], configs: list[dict[str, int]], restored: list[str] | None = None) -> Any:
    """`triton.autotune` with results kept on disk; the first configuration, untimed, in the interpreter."""

    def decorate(kernel: Any) -> Any:
        choices = [
            triton.Config(
                {name: value for name, value in config.items() if name.isupper()},
                num_warps=config.get("num_warps", 4),
                num_stages=config.get("num_stages", 3),
            )
            for config in (configs[:1] if INTERPRETED else configs)
        ]
        kept = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
        return triton.autotune(choices, key=keys, restore_value=restored, **kept)(kernel)

    return decorate


def _bucket(length: int) -> int:
    """Token counts that share a configuration: up to the next power of two."""
    return triton.next_power_of_2(max(length, 16))


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


# ---- kernels

_UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bf16


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right in fp32, `right` in the dtype of `left`."""
    right = right if right.dtype == left.dtype else narrow(right.to(tl.float32), left.dtype)
    if _UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """fp32 `value` in DTYPE, rounded to nearest; the interpreter's own conversion to bf16 cuts digits off."""
    if _UPCAST and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def elements(
    weight, absmax, code, rows, columns, inside, w_row, w_column, blocksize,
    FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
):  # fmt: skip
    """W0 [len(rows), len(columns)] in fp32, rounded as dequantisation does."""
    index = rows[:, None].to(tl.int64) * w_row + columns[None, :].to(tl.int64) * w_column
    if FOUR_BIT:
        byte = tl.load(weight + index // 2, inside, other=0).to(tl.int32)
        nibble = tl.where(index % 2 == 0, byte >> 4, byte & 15)
        value = tl.load(code + nibble) * tl.load(absmax + index // blocksize, inside, other=0.0)
        if HALF:
            value = value.to(tl.float16).to(tl.float32)
        if BRAIN:
            value = narrow(value, tl.bfloat16).to(tl.float32)
        return value
    return tl.load(weight + index, inside, other=0.0).to(tl.float32)


@triton.jit
def _kept(seed, rows, first, threshold, WIDTH: tl.constexpr):
    """[len(rows), WIDTH] bool: which elements of x dropout keeps, for columns first : first + WIDTH.

    Eight neighbours share one Philox draw of 128 bits, 16 bits each: the drawing takes longer than the reading of x
    otherwise.
    """
    groups = first // 8 + tl.arange(0, WIDTH // 8)
    row = (rows[:, None] + tl.zeros_like(groups)[None, :]).to(tl.uint32)
    group = (groups[None, :] + tl.zeros_like(rows)[:, None]).to(tl.uint32)
    zero = tl.zeros_like(row)
    a, b, c, d = tl.philox(seed, row, group, zero, zero)
    ab = tl.join(tl.join(a & 0xFFFF, a >> 16), tl.join(b & 0xFFFF, b >> 16))
    cd = tl.join(tl.join(c & 0xFFFF, c >> 16), tl.join(d & 0xFFFF, d >> 16))
    bits = tl.reshape(tl.join(ab, cd), (rows.shape[0], WIDTH))
    return bits.to(tl.int32) >= threshold


@_tuned(
    ["bucket", "width", "rank"],
    [
        {"ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3},
        {"ROWS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 2},
        {"ROWS": 32, "COLUMNS": 256, "num_warps": 4, "num_stages": 3},
        {"ROWS": 16, "COLUMNS": 128, "num_warps": 4, "num_stages": 4},
    ],
    restored=["out"],
)
@triton.jit
def _compose(
    z, u, lora_B, c, bias, out, length, width, rank, scaling, z_row, u_row, b_row, out_row, bucket,
    HAS_BIAS: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLUMNS)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < length, columns < width
    scale = tl.load(c + columns, in_columns, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        in_ranks = ranks < rank
        left = tl.load(u + rows[:, None] * u_row + ranks[None, :], in_rows[:, None] & in_ranks[None, :], other=0.0)
        right = tl.load(
            lora_B + columns[None, :] * b_row + ranks[:, None], in_ranks[:, None] & in_columns[None, :], other=0.0
        )
        if not FOLDED:
            right = right.to(tl.float32) * (scaling * scale)[None, :]
        total = dot(left, right, total, PRECISION)
    inside = in_rows[:, None] & in_columns[None, :]
    y = tl.load(z + rows[:, None] * z_row + columns[None, :], inside, other=0.0).to(tl.float32)
    y = y * scale[None, :] + total
    if HAS_BIAS:
        y += ((1 - scale) * tl.load(bias + columns, in_columns, other=0.0).to(tl.float32))[None, :]
    tl.store(out + rows[:, None] * out_row + columns[None, :], narrow(y, out.dtype.element_ty), inside)


@_tuned(
    ["bucket", "width"],
    [
        {"ROWS": 16, "COLUMNS": 128, "num_warps": 4},
        {"ROWS": 8, "COLUMNS": 256, "num_warps": 4},
        {"ROWS": 32, "COLUMNS": 128, "num_warps": 8},
        {"ROWS": 8, "COLUMNS": 512, "num_warps": 8},
    ],
)
@triton.jit
def _scale_and_sum(
    g, y, c, bias, scaled, sums, length, width, stripe, g_row, g_column, y_row, bucket,
    HAS_BIAS: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLUMNS)
    number = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < width
    scale = tl.load(c + columns, in_columns, other=0.0)
    if HAS_BIAS:
        offset = tl.load(bias + columns, in_columns, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((number + 1) * stripe, length)
    for start in range(number * stripe, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < end)[:, None] & in_columns[None, :]
        grad = tl.load(g + rows[:, None] * g_row + columns[None, :] * g_column, inside, other=0.0).to(tl.float32)
        if SUM:
            out = tl.load(y + rows[:, None] * y_row + columns[None, :], inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                out -= offset[None, :]
            total += grad * out  # outside the tensor grad is 0
        place = scaled + rows[:, None] * width + columns[None, :]
        tl.store(place, narrow(grad * scale[None, :], scaled.dtype.element_ty), inside)
    if SUM:
        tl.store(sums + number * width + columns, tl.sum(total, 0), in_columns)


@triton.jit
def _magnitude_gradient(
    sums, g, y, x, weight, absmax, code, u, lora_B, c, bias, out, stripes, length, width, features, rank, k,
    tiny, drowned, g_row, g_column, y_row, x_row, x_column, w_row, w_column, blocksize, u_row, b_row,
    HAS_BIAS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
    PRECISION: tl.constexpr, SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for number in range(stripes):
        total += tl.load(sums + number * width + columns, in_columns, other=0.0)
    scale = tl.load(c + columns, in_columns, other=1.0)
    lost = tl.abs(scale) < tiny
    if HAS_BIAS:
        offset = tl.load(bias + columns, in_columns, other=0.0).to(tl.float32)
        step = tl.maximum(length // SAMPLE, 1)
        rows = tl.arange(0, SAMPLE).to(tl.int64) * step
        sampled = (rows < length)[:, None] & in_columns[None, :]
        sample = tl.load(y + rows[:, None] * y_row + columns[None, :], sampled, other=0.0).to(tl.float32)
        below = sampled & (tl.abs(sample - offset[None, :]) < drowned * tl.abs(offset)[None, :])
        seen = tl.minimum(tl.cdiv(length, step), SAMPLE)
        lost = lost | (2 * tl.sum(below.to(tl.int32), 0) > seen - (seen % 2 == 0).to(tl.int32))
    lost = lost & in_columns
    result = total / tl.where(lost, 1.0, scale)
    if tl.max(lost.to(tl.int32), 0) > 0:
        # sum_n g_nj (x_n . W0_j + k u_n . B_j) = (g^T x)_j . W0_j + k (g^T u)_j . B_j
        exact = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, features, BLOCK):
            inputs = first + tl.arange(0, BLOCK)
            product = tl.zeros((COLUMNS, BLOCK), tl.float32)
            for start in range(0, length, ROWS):
                rows = (start + tl.arange(0, ROWS)).to(tl.int64)
                grad = tl.load(
                    g + rows[None, :] * g_row + columns[:, None] * g_column,
                    (rows < length)[None, :] & in_columns[:, None], other=0.0,
                )  # fmt: skip
                part = tl.load(
                    x + rows[:, None] * x_row + inputs[None, :] * x_column,
                    (rows < length)[:, None] & (inputs < features)[None, :], other=0.0,
                )  # fmt: skip
                product = dot(grad, part, product, PRECISION)
            in_block = in_columns[:, None] & (inputs < features)[None, :]
            block = elements(
                weight, absmax, code, columns, inputs, in_block, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
            )
            exact += tl.sum(product * block, 1)
        for first in range(0, rank, BLOCK):
            ranks = first + tl.arange(0, BLOCK)
            product = tl.zeros((COLUMNS, BLOCK), tl.float32)
            for start in range(0, length, ROWS):
                rows = (start + tl.arange(0, ROWS)).to(tl.int64)
                grad = tl.load(
                    g + rows[None, :] * g_row + columns[:, None] * g_column,
                    (rows < length)[None, :] & in_columns[:, None], other=0.0,
                )  # fmt: skip
                part = tl.load(
                    u + rows[:, None] * u_row + ranks[None, :],
                    (rows < length)[:, None] & (ranks < rank)[None, :], other=0.0,
                )  # fmt: skip
                product = dot(grad, part, product, PRECISION)
            in_block = in_columns[:, None] & (ranks < rank)[None, :]
            block = tl.load(lora_B + columns[:, None] * b_row + ranks[None, :], in_block, other=0.0)
            exact += k * tl.sum(product * block.to(tl.float32), 1)
        result = tl.where(lost, exact, result)
    tl.store(out + columns, result, in_columns)


@_tuned(
    ["bucket", "features", "rank"],
    [
        {"ROWS": 32, "BLOCK": 128, "num_warps": 4, "num_stages": 3},
        {"ROWS": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 3},
        {"ROWS": 16, "BLOCK": 256, "num_warps": 4, "num_stages": 3},
    ],
)
@triton.jit
def _dropped_product(
    x, lora_A, seed, out, length, features, rank, threshold, x_row, x_column, a_row, bucket,
    PRECISION: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rank, RANKS)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ranks = tl.program_id(0) % blocks * RANKS + tl.arange(0, RANKS)
    number = tl.load(seed)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, features, BLOCK):
        inputs = first + tl.arange(0, BLOCK)
        inside = (rows < length)[:, None] & (inputs < features)[None, :]
        left = tl.load(x + rows[:, None] * x_row + inputs[None, :] * x_column, inside, other=0.0)
        left = tl.where(_kept(number, rows, first, threshold, BLOCK), left, 0.0)
        right = tl.load(
            lora_A + ranks[None, :] * a_row + inputs[:, None],
            (ranks < rank)[None, :] & (inputs < features)[:, None], other=0.0,
        )  # fmt: skip
        total = dot(left, right, total, PRECISION)
    inside = (rows < length)[:, None] & (ranks < rank)[None, :]
    tl.store(out + rows[:, None] * rank + ranks[None, :], narrow(total, out.dtype.element_ty), inside)


@_tuned(
    ["bucket", "features", "rank"],
    [
        {"ROWS": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 3},
        {"ROWS": 32, "BLOCK": 256, "num_warps": 4, "num_stages": 3},
        {"ROWS": 16, "BLOCK": 128, "num_warps": 4, "num_stages": 4},
    ],
    restored=["out"],
)
@triton.jit
def _add_low_rank(
    du, lora_A, seed, out, length, features, rank, threshold, a_row, bucket,
    ADD: tl.constexpr, PRECISION: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(features, BLOCK)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    inputs = first + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        left = tl.load(
            du + rows[:, None] * rank + ranks[None, :], (rows < length)[:, None] & (ranks < rank)[None, :], other=0.0
        )
        right = tl.load(
            lora_A + ranks[:, None] * a_row + inputs[None, :],
            (ranks < rank)[:, None] & (inputs < features)[None, :], other=0.0,
        )  # fmt: skip
        total = dot(left, right, total, PRECISION)
    total = tl.where(_kept(tl.load(seed), rows, first, threshold, BLOCK), total, 0.0)
    inside = (rows < length)[:, None] & (inputs < features)[None, :]
    place = out + rows[:, None] * features + inputs[None, :]
    if ADD:
        total += tl.load(place, inside, other=0.0).to(tl.float32)
    tl.store(place, narrow(total, out.dtype.element_ty), inside)


@_tuned(
    ["bucket", "features", "rank"],
    [
        {"ROWS": 64, "BLOCK": 32, "num_warps": 4, "num_stages": 4},
        {"ROWS": 128, "BLOCK": 32, "num_warps": 4, "num_stages": 3},
        {"ROWS": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 3},
    ],
)
@triton.jit
def _dropped_gradient(
    du, x, seed, out, length, features, rank, threshold, x_row, x_column, bucket,
    PRECISION: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(features, BLOCK)
    ranks = tl.program_id(0) // blocks * RANKS + tl.arange(0, RANKS)
    first = tl.program_id(0) % blocks * BLOCK
    inputs = first + tl.arange(0, BLOCK)
    number = tl.load(seed)
    total = tl.zeros((RANKS, BLOCK), tl.float32)
    for start in range(0, length, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        left = tl.load(
            du + rows[None, :] * rank + ranks[:, None], (rows < length)[None, :] & (ranks < rank)[:, None], other=0.0
        )
        inside = (rows < length)[:, None] & (inputs < features)[None, :]
        right = tl.load(x + rows[:, None] * x_row + inputs[None, :] * x_column, inside, other=0.0)
        right = tl.where(_kept(number, rows, first, threshold, BLOCK), right, 0.0)
        total = dot(left, right, total, PRECISION)
    inside = (ranks < rank)[:, None] & (inputs < features)[None, :]
    tl.store(out + ranks[:, None] * features + inputs[None, :], narrow(total, out.dtype.element_ty), inside)


# ---- launchers


def stored_arguments(stored: Any, unused: Tensor) -> tuple[Any, ...]:
    """A weight's data, statistics and code, its strides and quantisation block, and how `elements` is to read it."""
    if isinstance(stored, FourBit):
        options = {"FOUR_BIT": True, "HALF": stored.dtype is torch.float16, "BRAIN": stored.dtype is torch.bfloat16}
        return stored.packed, stored.absmax, stored.code, stored.shape[1], 1, stored.blocksize, options
    return stored, unused, unused, *stored.stride(), 1, {"FOUR_BIT": False, "HALF": False, "BRAIN": False}


def _ranks(rank: int) -> int:
    """How many ranks a product takes at once; 16 is the least that the matrix units take."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def compose(
    z: Tensor, u: Tensor, lora_B: Tensor, c: Tensor, bias: Tensor | None, scaling: float | None, *, out: Tensor
) -> Tensor:
    """out = c * (z - b) + u (s c B)^T + b for z = x W0^T + b [N, out] and u [N, r]; `out` may be z.

    Where `scaling` is None, `lora_B` is s c B already, in u's dtype: the same bits as made here on the way.
    """
    length, width = z.shape
    if z.numel():
        _compose[lambda meta: (triton.cdiv(length, meta["ROWS"]) * triton.cdiv(width, meta["COLUMNS"]),)](
            z, u, lora_B, c, c if bias is None else bias, out, length, width, u.shape[1],
            0.0 if scaling is None else scaling, z.stride(0), u.stride(0), lora_B.stride(0), out.stride(0),
            _bucket(length),
            HAS_BIAS=bias is not None, FOLDED=scaling is None, PRECISION=_precision(u.dtype), RANKS=_ranks(u.shape[1]),
        )  # fmt: skip
    return out


def scale_and_sum(g: Tensor, c: Tensor, y: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """c * g [N, out], and sum_n g (y - b) [stripes, out] where y is given, both contiguous."""
    length, width = g.shape
    scaled = torch.empty(length, width, dtype=g.dtype, device=g.device)
    # enough stripes to fill a GPU, of enough tokens to make the second stage small beside the first
    stripe = max(64, -(-length // max(1, 2**14 // max(width // 128, 1))))
    stripes = -(-length // stripe)
    sums = None if y is None else torch.empty(stripes, width, dtype=torch.float32, device=g.device)
    if g.numel():
        _scale_and_sum[lambda meta: (stripes * triton.cdiv(width, meta["COLUMNS"]),)](
            g, g if y is None else y, c, c if bias is None else bias, scaled, c if sums is None else sums,
            length, width, stripe, g.stride(0), g.stride(1), 0 if y is None else y.stride(0), _bucket(length),
            HAS_BIAS=bias is not None, SUM=y is not None,
        )  # fmt: skip
    return scaled, sums


def magnitude_gradient(
    sums: Tensor,
    g: Tensor,
    y: Tensor,
    x: Tensor,
    stored: Any,
    u: Tensor,
    lora_B: Tensor,
    c: Tensor,
    bias: Tensor | None,
    k: float,
) -> Tensor:
    """dc_j = sum_n g_nj z_nj [out] with z = (y - b) / c where y tells z, and z = x W0^T + k u B^T elsewhere.

    Args:
        sums: From `scale_and_sum`.
        g, y: [N, out].
        x: [N, in], u [N, r], lora_B [out, r].
        stored: W0 as a matrix [out, in] of any strides, or as `base_weight.FourBit`.
    """
    out = torch.empty_like(c)
    length, width = g.shape
    block = 32
    weight, absmax, code, *layout, options = stored_arguments(stored, c)
    _magnitude_gradient[(triton.cdiv(width, block),)](
        sums, g, y, x, weight, absmax, code, u, lora_B, c, c if bias is None else bias, out,
        len(sums), length, width, x.shape[1], u.shape[1], k,
        _TINY.get(y.dtype, 1e-30), _DROWNED.get(y.dtype, 1e-3),
        *g.stride(), y.stride(0), *x.stride(), *layout, u.stride(0), lora_B.stride(0),
        HAS_BIAS=bias is not None, PRECISION=_precision(x.dtype), SAMPLE=_SAMPLE, **options,
        ROWS=64, COLUMNS=block, BLOCK=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one dropout mask, on the device: CUDA graphs draw another one at every replay."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> tuple[int, float]:
    """The number of the 2^16 draws that are dropped, and the exact probability to keep an element."""
    dropped = round(p * 2**16)
    return dropped, 1 - dropped / 2**16


def dropped_product(x: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    """(mask * x) A^T [N, r], not yet divided by 1 - p."""
    (length, features), rank = x.shape, len(lora_A)
    out = torch.empty(length, rank, dtype=x.dtype, device=x.device)
    ranks = _ranks(rank)
    if length:
        _dropped_product[lambda meta: (triton.cdiv(length, meta["ROWS"]) * triton.cdiv(rank, ranks),)](
            x, lora_A, seed, out, length, features, rank, threshold(p)[0], *x.stride(), lora_A.stride(0),
            _bucket(length), PRECISION=_precision(x.dtype), RANKS=ranks,
        )  # fmt: skip
    return out


def add_low_rank(dx: Tensor | None, du: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    """dx + mask * (du A) [N, in] in place; without the sum where dx is None."""
    (length, rank), features = du.shape, lora_A.shape[1]
    out = torch.empty(length, features, dtype=du.dtype, device=du.device) if dx is None else dx
    if length:
        _add_low_rank[lambda meta: (triton.cdiv(length, meta["ROWS"]) * triton.cdiv(features, meta["BLOCK"]),)](
            du, lora_A, seed, out, length, features, rank, threshold(p)[0], lora_A.stride(0), _bucket(length),
            ADD=dx is not None, PRECISION=_precision(du.dtype), RANKS=_ranks(rank),
        )  # fmt: skip
    return out


def dropped_gradient(du: Tensor, x: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """du^T (mask * x) [r, in] in `dtype`."""
    (length, rank), features = du.shape, x.shape[1]
    out = torch.empty(rank, features, dtype=dtype, device=x.device)
    ranks = _ranks(rank)
    _dropped_gradient[lambda meta: (triton.cdiv(rank, ranks) * triton.cdiv(features, meta["BLOCK"]),)](
        du, x, seed, out, length, features, rank, threshold(p)[0], *x.stride(), _bucket(length),
        PRECISION=_precision(x.dtype), RANKS=ranks,
    )  # fmt: skip
    return out


def dropout_mask(shape: torch.Size, seed: Tensor, p: float) -> Tensor:
    """The mask [N, in] that the kernels use, as a tensor of 0 and 1, for tests."""
    ones = torch.ones(shape[0], 1, device=seed.device)
    return add_low_rank(None, ones, torch.ones(1, shape[1], device=seed.device), seed, p)
