"""Triton kernels of the linear layer, and their launchers. fused.py makes a layer of them.

    compose             y = c * (z - b) + u (s c B)^T + b, over z in place
    scale_and_sum       g' = c * g, and sum_n g (y - b) a stripe of tokens at a time
    magnitude_gradient  dc from those sums, and exactly where y does not tell z

Each is one pass over its [N, features] tensors, with fp32 accumulation; the sums over tokens are made in two stages, so
that every result is deterministic. Nothing here synchronises with the host: what depends on values is decided inside
the kernels. The low-rank branch under dropout has kernels of its own, in dropout_kernels.py.

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

from ...bases import FourBit
from ..choice import interpreted
from ..linear import DROWNED, TINY

INTERPRETED = interpreted()
# Tokens that tell whether the bias drowns a column: half of them, since the first is often far larger than the others.
_SAMPLE = 64


def tuned(keys: list[str], configs: list[dict[str, int]], restored: list[str] | None = None) -> Any:
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


def token_bucket(length: int) -> int:
    """Token counts that share a configuration: up to the next power of two."""
    return triton.next_power_of_2(max(length, 16))


def precision(dtype: torch.dtype) -> str:
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


@tuned(
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


@tuned(
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


@triton.jit
def _magnitude_gradient(
    sums, g, y, x, weight, absmax, code, u, lora_B, c, bias, gone, out, stripes, length, width, features, rank, k,
    tiny, drowned, g_row, g_column, y_row, x_row, x_column, w_row, w_column, blocksize, u_row, b_row,
    HAS_BIAS: tl.constexpr, FOUR_BIT: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
    PRECISION: tl.constexpr, SAMPLE: tl.constexpr, CHECKED: tl.constexpr,
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
    if CHECKED:
        lost = lost | (tl.load(gone) != 0)
    lost = lost & in_columns
    result = total / tl.where(lost, 1.0, scale)
    if tl.max(lost.to(tl.int32), 0) > 0:
        # sum_n g_nj (x_n . W0_j + k u_n . B_j) = (g^T x)_j . W0_j + k (g^T u)_j . B_j
        exact = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, features, BLOCK):
            inputs = first + tl.arange(0, BLOCK)
            product = _transposed_product(
                g, x, columns, inputs, length, width, features, g_row, g_column, x_row, x_column, PRECISION, ROWS
            )
            in_block = in_columns[:, None] & (inputs < features)[None, :]
            block = elements(
                weight, absmax, code, columns, inputs, in_block, w_row, w_column, blocksize, FOUR_BIT, HALF, BRAIN
            )
            exact += tl.sum(product * block, 1)
        for first in range(0, rank, BLOCK):
            ranks = first + tl.arange(0, BLOCK)
            product = _transposed_product(
                g, u, columns, ranks, length, width, rank, g_row, g_column, u_row, 1, PRECISION, ROWS
            )
            in_block = in_columns[:, None] & (ranks < rank)[None, :]
            block = tl.load(lora_B + columns[:, None] * b_row + ranks[None, :], in_block, other=0.0)
            exact += k * tl.sum(product * block.to(tl.float32), 1)
        result = tl.where(lost, exact, result)
    tl.store(out + columns, result, in_columns)


@triton.jit(do_not_specialize=["offset", "start"])
def _take_sample(y, rows, diagonal, offset, start, step, size, count, BLOCK: tl.constexpr):
    """Copies `size` elements from `offset` on, and `count` elements from `start` on, `step` apart."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rows + lanes, tl.load(y + offset + lanes, lanes < size), lanes < size)
    places = start + lanes.to(tl.int64) * step
    tl.store(diagonal + lanes, tl.load(y + places, lanes < count), lanes < count)


@triton.jit(do_not_specialize=["offset", "start"])
def _compare_sample(y, rows, diagonal, gone, offset, start, step, size, count, BLOCK: tl.constexpr):
    """Sets gone[0] to 1 if y holds other bits there."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < size
    differs = tl.load(y + offset + lanes, inside, other=0) != tl.load(rows + lanes, inside, other=0)
    inside = lanes < count
    places = start + lanes.to(tl.int64) * step
    differs = differs | (tl.load(y + places, inside, other=0) != tl.load(diagonal + lanes, inside, other=0))
    tl.atomic_max(gone, tl.max(differs.to(tl.int32), 0))


# ---- launchers


def take_sample(y: Tensor, offset: int, start: int, step: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Elements of a contiguous y, copied: [size] from `offset` on, and [count] from `start` on, `step` apart."""
    rows, diagonal = y.new_empty(size), y.new_empty(count)
    if y.numel():
        _take_sample[(triton.cdiv(max(size, count), 1024),)](
            _bits(y), _bits(rows), _bits(diagonal), offset, start, step, size, count, BLOCK=1024, num_warps=4
        )
    return rows, diagonal


def compare_sample(y: Tensor, rows: Tensor, diagonal: Tensor, offset: int, start: int, step: int) -> Tensor:
    """A number [1], int32, that is not 0 if y holds other bits than `take_sample` copied."""
    gone = torch.zeros(1, dtype=torch.int32, device=y.device)
    if y.numel():
        size, count = rows.numel(), diagonal.numel()
        _compare_sample[(triton.cdiv(max(size, count), 1024),)](
            _bits(y), _bits(rows), _bits(diagonal), gone, offset, start, step, size, count, BLOCK=1024, num_warps=4
        )
    return gone


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers: NaN is equal to itself there."""
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def stored_arguments(stored: Any, unused: Tensor) -> tuple[Any, ...]:
    """A weight's data, statistics and code, its strides and quantisation block, and how `elements` is to read it."""
    if isinstance(stored, FourBit):
        options = {"FOUR_BIT": True, "HALF": stored.dtype is torch.float16, "BRAIN": stored.dtype is torch.bfloat16}
        return stored.packed, stored.absmax, stored.code, stored.shape[1], 1, stored.blocksize, options
    return stored, unused, unused, *stored.stride(), 1, {"FOUR_BIT": False, "HALF": False, "BRAIN": False}


def ranks_at_once(rank: int) -> int:
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
            token_bucket(length), HAS_BIAS=bias is not None, FOLDED=scaling is None,
            PRECISION=precision(u.dtype), RANKS=ranks_at_once(u.shape[1]),
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
            length, width, stripe, g.stride(0), g.stride(1), 0 if y is None else y.stride(0), token_bucket(length),
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
    gone: Tensor | None = None,
) -> Tensor:
    """dc_j = sum_n g_nj z_nj [out] with z = (y - b) / c where y tells z, and z = x W0^T + k u B^T elsewhere.

    Args:
        sums: From `scale_and_sum`.
        g, y: [N, out].
        x: [N, in], u [N, r], lora_B [out, r].
        stored: W0 as a matrix [out, in] of any strides, or as `base_weight.FourBit`.
        gone: A number [1]; y tells nothing if it is not 0.
    """
    out = torch.empty_like(c)
    length, width = g.shape
    block = 32
    weight, absmax, code, *layout, options = stored_arguments(stored, c)
    _magnitude_gradient[(triton.cdiv(width, block),)](
        sums, g, y, x, weight, absmax, code, u, lora_B, c, c if bias is None else bias, c if gone is None else gone,
        out, len(sums), length, width, x.shape[1], u.shape[1], k,
        TINY.get(y.dtype, 1e-30), DROWNED.get(y.dtype, 1e-3),
        *g.stride(), y.stride(0), *x.stride(), *layout, u.stride(0), lora_B.stride(0),
        HAS_BIAS=bias is not None, PRECISION=precision(x.dtype), SAMPLE=_SAMPLE, CHECKED=gone is not None, **options,
        ROWS=64, COLUMNS=block, BLOCK=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
