"""Triton kernels of the low-rank branch under dropout, whose mask is drawn again whenever it is needed, never stored.

    dropped_product     (mask * x) A^T
    add_low_rank        dx + mask * (du A), in place
    dropped_gradient    du^T (mask * x)

A mask is a function of its seed and of row and column alone, whatever the blocks that a kernel works in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import dot, narrow
from .options import Seed, precision, threshold
from .tuning import cdiv, ranks_at_once, token_bucket, tuned


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


@tuned(
    ["bucket", "features", "rank"],
    [
        # of 8 warps each: a thread's part of a block, three times of it in fp32, and its draws would not fit into 4
        {"ROWS": 64, "BLOCK": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 32, "BLOCK": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 16, "BLOCK": 128, "num_warps": 8, "num_stages": 3},
    ],
)
@triton.jit(do_not_specialize=["seed", "length", "bucket"])
def _dropped_product(
    x, lora_A, seed, out, length, features, rank, threshold, x_row, x_column, a_row, bucket,
    ON_HOST: tl.constexpr, PRECISION: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rank, RANKS)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ranks = (tl.program_id(0) % blocks * RANKS + tl.arange(0, RANKS)).to(tl.int64)
    number = seed if ON_HOST else tl.load(seed)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, features, BLOCK):
        inputs = (first + tl.arange(0, BLOCK)).to(tl.int64)
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


@triton.jit
def _low_rank(du, lora_A, rows, inputs, ranks, length, features, rank, a_row, total, PRECISION: tl.constexpr):
    """total + (du A)[rows, inputs] over `ranks`."""
    left = tl.load(
        du + rows[:, None] * rank + ranks[None, :], (rows < length)[:, None] & (ranks < rank)[None, :], other=0.0
    )
    right = tl.load(
        lora_A + ranks.to(tl.int64)[:, None] * a_row + inputs[None, :],
        (ranks < rank)[:, None] & (inputs < features)[None, :], other=0.0,
    )  # fmt: skip
    return dot(left, right, total, PRECISION)


@tuned(
    ["bucket", "features", "rank"],
    [
        {"ROWS": 64, "BLOCK": 128, "num_warps": 8, "num_stages": 2},
        {"ROWS": 32, "BLOCK": 128, "num_warps": 4, "num_stages": 2},
        {"ROWS": 16, "BLOCK": 128, "num_warps": 4, "num_stages": 2},
        {"ROWS": 32, "BLOCK": 256, "num_warps": 8, "num_stages": 2},
    ],
    scratch=["out"],
)
@triton.jit(do_not_specialize=["seed", "length", "bucket"])
def _add_low_rank(
    du, lora_A, seed, out, length, features, rank, threshold, a_row, bucket,
    ADD: tl.constexpr, ON_HOST: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(features, BLOCK)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    inputs = (first + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (rows < length)[:, None] & (inputs < features)[None, :]
    place = out + rows[:, None] * features + inputs[None, :]
    if ADD:
        # before the products and the mask, which are made while it is on its way
        base = tl.load(place, inside, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if ONCE:
        ranks = tl.arange(0, RANKS)
        total = _low_rank(du, lora_A, rows, inputs, ranks, length, features, rank, a_row, total, PRECISION)
    else:
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            total = _low_rank(du, lora_A, rows, inputs, ranks, length, features, rank, a_row, total, PRECISION)
    number = seed if ON_HOST else tl.load(seed)
    total = tl.where(_kept(number, rows, first, threshold, BLOCK), total, 0.0)
    if ADD:
        total += base.to(tl.float32)
    tl.store(place, narrow(total, out.dtype.element_ty), inside)


@tuned(
    ["bucket", "features", "rank"],
    [
        {"ROWS": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 3},
        {"ROWS": 64, "BLOCK": 32, "num_warps": 4, "num_stages": 3},
        # 4 warps would spill at 64 ranks
        {"ROWS": 32, "BLOCK": 128, "num_warps": 8, "num_stages": 3},
        # of fp32 by columns
        {"ROWS": 64, "BLOCK": 128, "num_warps": 8, "num_stages": 2, "shared_kib": 100},
    ],
)
@triton.jit(do_not_specialize=["seed", "length", "stripe", "bucket"])
def _dropped_gradient(
    du, x, seed, out, length, features, rank, stripe, threshold, x_row, x_column, bucket,
    ON_HOST: tl.constexpr, PRECISION: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks, groups = tl.cdiv(features, BLOCK), tl.cdiv(rank, RANKS)
    group = tl.program_id(0) // blocks % groups
    part = tl.program_id(0) // blocks // groups
    ranks = (group * RANKS + tl.arange(0, RANKS)).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    inputs = (first + tl.arange(0, BLOCK)).to(tl.int64)
    number = seed if ON_HOST else tl.load(seed)
    total = tl.zeros((RANKS, BLOCK), tl.float32)
    end = tl.minimum((part + 1) * stripe, length)
    for start in range(part * stripe, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        left = tl.load(
            du + rows[None, :] * rank + ranks[:, None], (rows < end)[None, :] & (ranks < rank)[:, None], other=0.0
        )
        inside = (rows < end)[:, None] & (inputs < features)[None, :]
        right = tl.load(x + rows[:, None] * x_row + inputs[None, :] * x_column, inside, other=0.0)
        right = tl.where(_kept(number, rows, first, threshold, BLOCK), right, 0.0)
        total = dot(left, right, total, PRECISION)
    inside = (ranks < rank)[:, None] & (inputs < features)[None, :]
    place = out + (part * rank + ranks)[:, None] * features + inputs[None, :]
    tl.store(place, narrow(total, out.dtype.element_ty), inside)


def draw_seed(device: torch.device) -> Seed:
    """A seed for one dropout mask: a number from the CPU's generator, which costs no launch.

    In a CUDA graph it is drawn on the device instead, so that every replay draws another one.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    # of 64 bits, since Triton compiles one kernel for smaller numbers and one for these
    return int(torch.randint(2**32, 2**62, (), dtype=torch.int64, device="cpu"))


def dropped_product(x: Tensor, lora_A: Tensor, seed: Seed, p: float, *, out: Tensor | None = None) -> Tensor:
    """(mask * x) A^T [N, r], not yet divided by 1 - p; written to `out`, if it is given."""
    (length, features), rank = x.shape, len(lora_A)
    out = torch.empty(length, rank, dtype=x.dtype, device=x.device) if out is None else out
    ranks = ranks_at_once(rank, x.dtype, fp32=32)
    if length:
        _dropped_product[lambda meta: (cdiv(length, meta["ROWS"]) * cdiv(rank, ranks),)](
            x, lora_A, seed, out, length, features, rank, threshold(p)[0], *x.stride(), lora_A.stride(0),
            token_bucket(length), ON_HOST=isinstance(seed, int), PRECISION=precision(x.dtype), RANKS=ranks,
        )  # fmt: skip
    return out


def add_low_rank(dx: Tensor | None, du: Tensor, lora_A: Tensor, seed: Seed, p: float) -> Tensor:
    """dx + mask * (du A) [N, in] in place; without the sum if dx is None."""
    (length, rank), features = du.shape, lora_A.shape[1]
    out = torch.empty(length, features, dtype=du.dtype, device=du.device) if dx is None else dx
    ranks = ranks_at_once(rank, du.dtype)
    if length:
        _add_low_rank[lambda meta: (cdiv(length, meta["ROWS"]) * cdiv(features, meta["BLOCK"]),)](
            du, lora_A, seed, out, length, features, rank, threshold(p)[0], lora_A.stride(0), token_bucket(length),
            ADD=dx is not None, ON_HOST=isinstance(seed, int), PRECISION=precision(du.dtype),
            RANKS=ranks, ONCE=rank <= ranks,
        )  # fmt: skip
    return out


def dropped_gradient(
    du: Tensor, x: Tensor, seed: Seed, p: float, dtype: torch.dtype, *, parts: Tensor | None = None
) -> Tensor:
    """du^T (mask * x) [r, in] in `dtype`, summed in two stages: over the tokens of a stripe, and over the stripes.

    Args:
        parts: [stripes * r, in] for the first stage, in `dtype` if there is one stripe, else fp32; the result then is
            left there.
    """
    (length, rank), features = du.shape, x.shape[1]
    ranks = ranks_at_once(rank, x.dtype)
    stripe, stripes = striped(length, features, rank, x.dtype)
    out = parts
    if out is None:
        first = dtype if stripes == 1 else torch.float32
        out = torch.empty(stripes * rank, features, dtype=first, device=x.device)
    _dropped_gradient[lambda meta: (stripes * cdiv(rank, ranks) * cdiv(features, meta["BLOCK"]),)](
        du, x, seed, out, length, features, rank, stripe, threshold(p)[0], *x.stride(), token_bucket(length),
        ON_HOST=isinstance(seed, int), PRECISION=precision(x.dtype), RANKS=ranks,
    )  # fmt: skip
    return out if stripes == 1 or parts is not None else summed(out, stripes).to(dtype)


def striped(length: int, features: int, rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens in a stripe, and stripes: about four programs for each processor of a large GPU, of no fewer tokens than
    make up for the second stage."""
    groups = cdiv(rank, ranks_at_once(rank, dtype))
    wanted = cdiv(512, groups * cdiv(features, 64))
    stripe = max(256, cdiv(cdiv(length, wanted), 128) * 128)
    return stripe, max(1, cdiv(length, stripe))


def summed(parts: Tensor, stripes: int) -> Tensor:
    """[stripes * r, in] over the stripes, [r, in]."""
    return parts.view(stripes, -1, parts.shape[1]).sum(0)


def drawn_mask(shape: torch.Size, seed: Seed, p: float, device: torch.device) -> Tensor:
    """The mask [N, in] that the kernels use, as a tensor of 0 and 1, for tests."""
    ones = torch.ones(shape[0], 1, device=device)
    return add_low_rank(None, ones, torch.ones(1, shape[1], device=device), seed, p)
