"""Triton kernels of the linear layer, and their launchers. fused.py makes a layer of them.

    scaled_sum          y = c * (z - b) + u (s c B)^T + b, over z in place
    scale_and_sum       g' = c * g, and sum_n g (y - b) a stripe of tokens at a time
    magnitude_gradient  dc from those sums, and exactly if y does not determine z

Each is one pass over its [N, features] tensors, with fp32 accumulation; the sums over tokens are made in two stages, so
that every result is deterministic. Nothing here synchronises with the host: what depends on values is decided inside
the kernels. The low-rank branch under dropout has other kernels, in dropout.py.

This module imports Triton, so `ops.choice` imports it only if kernels are to run. With TRITON_INTERPRET=1 in the
environment before Triton is first imported, the kernels run on the CPU in Triton's interpreter, as in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bases import FourBit
from ..constants import DROWNED, TINY
from .elements import dot, elements, narrow, stored_arguments
from .launch import Kernel
from .options import precision
from .tuning import cdiv, ranks_at_once, token_bucket, tuned

# Tokens that are looked at to decide whether the bias hides a column: half of them must agree, because the first token
# is often an outlier.
_SAMPLE = 64
# Ranks above which s c B is made once, in u's dtype: every block of rows would make it again, from B in fp32.
MANY_RANKS = 64


@triton.jit
def _low_rank(
    u, lora_B, scale, rows, columns, ranks, in_rows, in_columns, rank, u_row, b_row, total,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + (u (scale B)^T)[rows, columns] over `ranks`; B alone if it is FOLDED."""
    in_ranks = ranks < rank
    left = tl.load(u + rows[:, None] * u_row + ranks[None, :], in_rows[:, None] & in_ranks[None, :], other=0.0)
    right = tl.load(
        lora_B + columns[None, :] * b_row + ranks[:, None], in_ranks[:, None] & in_columns[None, :], other=0.0
    )
    if not FOLDED:
        right = right.to(tl.float32) * scale[None, :]
    return dot(left, right, total, PRECISION)


@triton.jit(do_not_specialize=["length", "bucket"])
def _scaled_sum(
    z, u, lora_B, c, bias, out, length, width, rank, scaling, z_row, u_row, b_row, out_row, bucket,
    HAS_BIAS: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr, RANKS: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLUMNS)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    in_rows, in_columns = rows < length, columns < width
    inside = in_rows[:, None] & in_columns[None, :]
    # before the products, which are made while it is on its way
    base = tl.load(z + rows[:, None] * z_row + columns[None, :], inside, other=0.0)
    scale = tl.load(c + columns, in_columns, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ONCE:
        total = _low_rank(
            u, lora_B, scaling * scale, rows, columns, tl.arange(0, RANKS), in_rows, in_columns, rank, u_row, b_row,
            total, FOLDED, PRECISION,
        )  # fmt: skip
    else:
        for start in range(0, rank, RANKS):
            total = _low_rank(
                u, lora_B, scaling * scale, rows, columns, start + tl.arange(0, RANKS), in_rows, in_columns, rank,
                u_row, b_row, total, FOLDED, PRECISION,
            )  # fmt: skip
    y = base.to(tl.float32) * scale[None, :] + total
    if HAS_BIAS:
        y += ((1 - scale) * tl.load(bias + columns, in_columns, other=0.0).to(tl.float32))[None, :]
    tl.store(out + rows[:, None] * out_row + columns[None, :], narrow(y, out.dtype.element_ty), inside)


_scaled_sum_of_few_ranks = tuned(
    ["bucket", "width", "rank"],
    [
        {"ROWS": 64, "COLUMNS": 128, "num_warps": 8, "num_stages": 2},
        {"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 2},
        {"ROWS": 16, "COLUMNS": 128, "num_warps": 8, "num_stages": 2},
        {"ROWS": 32, "COLUMNS": 256, "num_warps": 8, "num_stages": 2},
    ],
    scratch=["out"],
)(_scaled_sum)
# Large blocks, since each reads its rows of u and of B again: at rank 384 more bytes than it has of z.
_scaled_sum_of_many_ranks = tuned(
    ["bucket", "width", "rank"],
    [
        {"ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3},
        {"ROWS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 2},
        {"ROWS": 64, "COLUMNS": 256, "num_warps": 8, "num_stages": 2},
        {"ROWS": 16, "COLUMNS": 128, "num_warps": 4, "num_stages": 4},
        {"ROWS": 128, "COLUMNS": 256, "num_warps": 8, "num_stages": 4, "shared_kib": 192},
    ],
    scratch=["out"],
)(_scaled_sum)


@tuned(
    ["bucket", "width"],
    [
        {"ROWS": 16, "COLUMNS": 128, "num_warps": 4},
        {"ROWS": 8, "COLUMNS": 256, "num_warps": 4},
        {"ROWS": 32, "COLUMNS": 128, "num_warps": 8},
        {"ROWS": 8, "COLUMNS": 512, "num_warps": 8},
    ],
)
@triton.jit(do_not_specialize=["length", "stripe", "bucket"])
def _scale_and_sum(
    g, y, c, bias, scaled, sums, length, width, stripe, g_row, g_column, y_row, bucket,
    HAS_BIAS: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLUMNS)
    number = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
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
            # outside the tensor grad is 0
            total += grad * out
        place = scaled + rows[:, None] * width + columns[None, :]
        tl.store(place, narrow(grad * scale[None, :], scaled.dtype.element_ty), inside)
    if SUM:
        tl.store(sums + number * width + columns, tl.sum(total, 0), in_columns)


@triton.jit
def _transposed_product(
    g, x, columns, inputs, length, width, features, g_row, g_column, x_row, x_column,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(g^T x)[columns, inputs] in fp32."""
    total = tl.zeros((columns.shape[0], inputs.shape[0]), tl.float32)
    for start in range(0, length, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        left = tl.load(
            g + rows[None, :] * g_row + columns[:, None] * g_column,
            (rows < length)[None, :] & (columns < width)[:, None], other=0.0,
        )  # fmt: skip
        right = tl.load(
            x + rows[:, None] * x_row + inputs[None, :] * x_column,
            (rows < length)[:, None] & (inputs < features)[None, :], other=0.0,
        )  # fmt: skip
        total = dot(left, right, total, PRECISION)
    return total


@Kernel
@triton.jit(do_not_specialize=["stripes", "length"])
def _magnitude_gradient(
    sums, g, y, x, weight, absmax, code, u, lora_B, c, bias, gone, out, stripes, length, width, features, rank, k,
    tiny, drowned, g_row, g_column, y_row, x_row, x_column, w_row, w_column, blocksize, u_row, b_row,
    HAS_BIAS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
    PRECISION: tl.constexpr, SAMPLE: tl.constexpr, CHECKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    in_columns = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, stripes, ROWS):
        # many at once: one after the other, each would wait for memory
        numbers = start + tl.arange(0, ROWS)
        place = sums + numbers.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.sum(tl.load(place, (numbers < stripes)[:, None] & in_columns[None, :], other=0.0), 0)
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
    if CHECKED:
        lost = lost | (tl.load(gone) != 0)
    lost = lost & in_columns
    result = total / tl.where(lost, 1.0, scale)
    if tl.max(lost.to(tl.int32), 0) > 0:
        # sum_n g_nj (x_n . W0_j + k u_n . B_j) = (g^T x)_j . W0_j + k (g^T u)_j . B_j
        exact = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, features, BLOCK):
            inputs = (first + tl.arange(0, BLOCK)).to(tl.int64)
            product = _transposed_product(
                g, x, columns, inputs, length, width, features, g_row, g_column, x_row, x_column, PRECISION, ROWS
            )
            in_block = in_columns[:, None] & (inputs < features)[None, :]
            block = elements(
                weight, absmax, code, columns, inputs, in_block, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
            )
            exact += tl.sum(product * block, 1)
        for first in range(0, rank, BLOCK):
            ranks = (first + tl.arange(0, BLOCK)).to(tl.int64)
            product = _transposed_product(
                g, u, columns, ranks, length, width, rank, g_row, g_column, u_row, 1, PRECISION, ROWS
            )
            in_block = in_columns[:, None] & (ranks < rank)[None, :]
            block = tl.load(lora_B + columns[:, None] * b_row + ranks[None, :], in_block, other=0.0)
            exact += k * tl.sum(product * block.to(tl.float32), 1)
        result = tl.where(lost, exact, result)
    tl.store(out + columns, result, in_columns)


def scaled_sum(
    z: Tensor, u: Tensor, lora_B: Tensor, c: Tensor, bias: Tensor | None, scaling: float | None, *, out: Tensor
) -> Tensor:
    """out = c * (z - b) + u (s c B)^T + b for z = x W0^T + b [N, out] and u [N, r]; `out` may be z.

    Args:
        z, u: Of one dtype, with rows of stride 1.
        lora_B: [out, r].
        c, bias: [out].
        scaling: s; None if `lora_B` is s c B already, in u's dtype: the same bits as are made here on the way.

    Returns:
        `out`.
    """
    (length, width), rank = z.shape, u.shape[1]
    ranks = ranks_at_once(rank, u.dtype)
    if scaling is not None and rank > MANY_RANKS:
        folded = torch.empty(lora_B.shape, dtype=u.dtype, device=u.device)
        lora_B, scaling = torch.mul(lora_B, (scaling * c).unsqueeze(1), out=folded), None
    if not z.numel():
        return out
    arguments = (
        z, u, lora_B, c, c if bias is None else bias, out, length, width, rank, 0.0 if scaling is None else scaling,
        z.stride(0), u.stride(0), lora_B.stride(0), out.stride(0), token_bucket(length),
    )  # fmt: skip
    constants = {
        "HAS_BIAS": bias is not None, "FOLDED": scaling is None, "PRECISION": precision(u.dtype), "RANKS": ranks,
        "ONCE": rank <= ranks,
    }  # fmt: skip

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        return (cdiv(length, meta["ROWS"]) * cdiv(width, meta["COLUMNS"]),)

    # fp32 spills in large blocks
    if rank > MANY_RANKS and u.dtype is not torch.float32:
        _scaled_sum_of_many_ranks[grid](*arguments, **constants)
    else:
        _scaled_sum_of_few_ranks[grid](*arguments, **constants)
    return out


def scale_and_sum(
    g: Tensor, c: Tensor, y: Tensor | None, bias: Tensor | None, *, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """g' = c * g, and sum_n g (y - b) for each stripe of tokens.

    Args:
        g: dL/dy [N, out].
        c, bias: [out].
        y: The layer's output [N, out], None if no sums are needed.
        into: Memory for both.

    Returns:
        [N, out] and [stripes, out], contiguous; None for the sums without y.
    """
    length, width = g.shape
    stripe, stripes = striped(length, width)
    scaled = torch.empty(length, width, dtype=g.dtype, device=g.device) if into is None else into[0]
    if into is not None:
        sums: Tensor | None = into[1]
    else:
        sums = None if y is None else torch.empty(stripes, width, dtype=torch.float32, device=g.device)
    if g.numel():
        _scale_and_sum[lambda meta: (stripes * cdiv(width, meta["COLUMNS"]),)](
            g, g if y is None else y, c, c if bias is None else bias, scaled, c if sums is None else sums,
            length, width, stripe, g.stride(0), g.stride(1), 0 if y is None else y.stride(0), token_bucket(length),
            HAS_BIAS=bias is not None, SUM=y is not None,
        )  # fmt: skip
    return scaled, sums


def striped(length: int, width: int) -> tuple[int, int]:
    """Tokens in a stripe, and stripes: enough of them to fill a GPU, of enough tokens to make the second stage small
    beside the first."""
    stripe = max(64, -(-length // max(1, 2**14 // max(width // 128, 1))))
    return stripe, -(-length // stripe)


def magnitude_gradient(
    sums: Tensor,
    g: Tensor,
    y: Tensor,
    x: Tensor,
    stored: Tensor | FourBit,
    u: Tensor,
    lora_B: Tensor,
    c: Tensor,
    bias: Tensor | None,
    k: float,
    gone: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """dc_j = sum_n g_nj z_nj [out] with z = (y - b) / c if y determines z, and z = x W0^T + k u B^T if not.

    Args:
        sums: From `scale_and_sum`.
        g, y: [N, out].
        x: [N, in].
        stored: W0, see `BaseWeight.stored`.
        u: [N, r].
        lora_B: [out, r].
        c, bias: [out].
        k: s / (1 - p).
        gone: A number [1]; y determines nothing if it is not 0.
        out: [out], to write to.

    Returns:
        [out], in c's dtype.
    """
    out = torch.empty_like(c) if out is None else out
    length, width = g.shape
    block = 32
    weight, absmax, code, layout, options = stored_arguments(stored, c)
    _magnitude_gradient[(cdiv(width, block),)](
        sums, g, y, x, weight, absmax, code, u, lora_B, c, c if bias is None else bias, c if gone is None else gone,
        out, len(sums), length, width, x.shape[1], u.shape[1], k,
        TINY[y.dtype], DROWNED[y.dtype],
        *g.stride(), y.stride(0), *x.stride(), *layout, u.stride(0), lora_B.stride(0),
        HAS_BIAS=bias is not None, PRECISION=precision(x.dtype), SAMPLE=_SAMPLE, CHECKED=gone is not None, **options,
        ROWS=64, COLUMNS=block, BLOCK=64, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
