"""v = ||W0 + s B A|| per output row, its gradient, and c = m / v, with at most a block of W0 + s B A at a time.

Only `attach_norm_gradient`, for the compiler, names W0 as a whole.

The equations and symbols are those of reference.py. When v is computed is decided in norms/.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases import BaseWeight, scratch
from ..bases.input_gradient import differentiated_twice
from . import choice
from .constants import CANCELLATION
from .products import Products, compose_weight, multiply_many
from .workspace import workspace

# Rows of W0 + s B A that the norm makes at a time on a CPU: larger temporaries fall out of its cache, and every
# allocation pays page faults; smaller ones cost more to start than they save.
NORM_BLOCK_BYTES = 4 * 2**20


def row_norms(weight: BaseWeight, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out] by the best of three ways, in the accumulation dtype of `weight`; not floored.

    Densely if blocks of W0 lie in memory as they are needed and the processor has a cache to keep W0 + s B A in: as
    fast as the factored sum, and without its cancellation. Factored otherwise, on a GPU by a kernel.
    """
    # asked before, since some weights are made readable for kernels first
    stored = weight.stored() if choice.uses_kernels(weight.device, weight.dtype) else None
    if stored is not None and choice.uses_kernels(weight.device, weight.dtype, stored.dtype):
        return choice.norm_kernels().row_norms(stored, base_squared, lora_A, lora_B, scaling)
    if not weight.has_blocks or weight.device.type != "cpu":
        return factored_norm_squared(weight, base_squared, lora_A, lora_B, scaling).clamp_(min=0).sqrt_()
    step = max(1, min(weight.dense_rows, NORM_BLOCK_BYTES // (weight.in_features * weight.dtype.itemsize)))
    out = torch.empty_like(base_squared)
    size = min(step, weight.out_features) * weight.in_features
    # without an operation that frees its buffer at its end: that of the thread
    lent = scratch.lent(size, weight.dtype, weight.device) if scratch.is_kept() else None
    with nullcontext(workspace("composed", (size,), out)) if lent is None else lent as memory:
        for start in range(0, weight.out_features, step):
            stop = min(start + step, weight.out_features)
            rows = weight.block(start, stop, memory)
            # rows that are a copy already are composed where they are
            into = rows if weight.copies else memory[: rows.numel()].view(rows.shape)
            composed = compose_weight(rows, lora_A, lora_B[start:stop], scaling, out=into)
            torch.linalg.vector_norm(composed, dim=1, out=out[start:stop])
    return out


@dataclass(frozen=True, slots=True)
class Sharing:
    """A pass of x through a layer, in training on a CPU, with which a new norm shares what it reads or makes of W0.

    Attributes:
        matrix: W0 [out, in], dense.
        rows: x [N, in], in the dtype of W0 where `products` has any of the ways.
        products: How the layer multiplies.
        drops: Whether the low-rank branch sees another x, so that W0 + s B A is of no use to the pass.
    """

    matrix: Tensor
    rows: Tensor
    products: Products
    drops: bool

    def norm(
        self, seam: Callable[[], BaseWeight], base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """v [out], not floored; W0 + s B A [out, in], if it was made; x W0^T [N, out], if it was made."""
        count, products, matrix = len(self.rows), self.products, self.matrix
        # at B = 0 v has to have the bits of m at creation, so that c is 1
        if count < products.beside and bool(lora_B.any()):
            multiply = multiply_many if count + len(lora_A) >= products.wide else F.linear
            value, product = norm_beside_product(
                seam(), matrix, base_squared, lora_A, lora_B, scaling, self.rows, multiply
            )
            return value, None, product
        if matrix.dtype is not lora_A.dtype or not matrix.is_contiguous():
            return row_norms(seam(), base_squared, lora_A, lora_B, scaling), None, None
        step = len(matrix) if matrix.nbytes <= NORM_BLOCK_BYTES else NORM_BLOCK_BYTES // (matrix.nbytes // len(matrix))
        reused = not self.drops and count >= products.composed
        if reused or step >= len(matrix):
            composed = compose_weight(matrix, lora_A, lora_B, scaling)
            return torch.linalg.vector_norm(composed, dim=1), composed if reused else None, None
        parts = zip(matrix.split(max(1, step)), lora_B.split(max(1, step)), strict=True)
        norms = [torch.linalg.vector_norm(compose_weight(w, lora_A, B, scaling), dim=1) for w, B in parts]
        return torch.cat(norms), None, None


def norm_beside_product(
    weight: BaseWeight,
    matrix: Tensor,
    base_squared: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rows: Tensor,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """v [out], not floored, and x W0^T [N, out], by one product in which the rows of A follow those of x.

    Args:
        matrix: W0 [out, in], as `weight` holds it.
        rows: x [N, in].
        multiply: Gives rows W0^T.
    """
    together = workspace("beside", (len(rows) + len(lora_A), rows.shape[1]), rows)
    both = multiply(torch.cat([rows, lora_A], out=together), matrix)
    cross = both[len(rows) :].T
    squared = factored_norm_squared(weight, base_squared, lora_A, lora_B, scaling, cross)
    return squared.clamp_(min=0).sqrt_(), both[: len(rows)]


def factored_norm_squared(
    weight: BaseWeight,
    base_squared: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    product: Tensor | None = None,
) -> Tensor:
    """v^2 [out] from the factors, in the accumulation dtype of `weight`:

    v^2 = ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B)

    Args:
        base_squared: ||W0||^2 per row, [out].
        lora_A, lora_B: [r, in] and [out, r], in the accumulation dtype.
        product: W0 A^T [out, r], if it is known.
    """
    cross = torch.linalg.vecdot(weight.times(lora_A) if product is None else product, lora_B)
    change = torch.linalg.vecdot(lora_B @ (lora_A @ lora_A.T), lora_B)
    # ||W0||^2 + s^2 ||BA||^2
    total = torch.add(base_squared, change, alpha=scaling**2)
    squared = torch.add(total, cross, alpha=2 * scaling)
    if weight.has_rows:
        # one number is read faster than a comparison is made
        if not len(total) or float(torch.sub(squared, total, alpha=CANCELLATION).min()) >= 0:
            return squared
        cancelling = squared < CANCELLATION * total
        for rows in cancelling.nonzero()[:, 0].split(weight.dense_rows):
            dense = weight.rows(rows) + scaling * (lora_B[rows] @ lora_A)
            squared[rows] = dense.square_().sum(1)
    return squared


def floor(base_squared: Tensor) -> Tensor:
    """The smallest v that is divided by, [out]: rounding level of ||W0||, for rows whose v vanishes over W0 != 0."""
    return base_squared.sqrt().mul_(torch.finfo(base_squared.dtype).eps).clamp_(min=1e-30)


class _WeightNorm(torch.autograd.Function):
    """v as a differentiable function of A and B, for `detach_norm=False`; W0 is read again, not saved.

    With h = dL/dv / v, P = W0 A^T, G = A A^T:

        dB = s h (P + s B G)            dA = s (hB)^T W0 + s^2 (B^T (hB)) A
    """

    @staticmethod
    def forward(ctx, lora_A, lora_B, weight, norm, scaling):
        ctx.save_for_backward(lora_A, lora_B, norm)
        ctx.weight, ctx.scaling = weight, scaling
        return norm.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise differentiated_twice()
        lora_A, lora_B, norm = ctx.saved_tensors
        weight, s = ctx.weight, ctx.scaling
        with torch.autocast(grad.device.type, enabled=False):
            A, B = lora_A.to(norm.dtype), lora_B.to(norm.dtype)
            # [out, 1]
            h = (grad / norm)[:, None]
            # [out, r]
            hB = h * B
            # [r, in]
            grad_A = s * weight.vjp(hB) + s**2 * ((B.T @ hB) @ A)
            # [out, r]
            grad_B = s * h * (weight.times(A) + s * (B @ (A @ A.T)))
        return grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), None, None, None


def weight_norm(
    weight: BaseWeight,
    base_squared: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    value: Tensor | None = None,
) -> Tensor:
    """v [out], differentiable with respect to A and B; equals `reference.weight_norm(W0, A, B, s)`.

    `value` is v if it is known already; only its gradient is computed then.
    """
    if value is None:
        with torch.no_grad(), torch.autocast(lora_A.device.type, enabled=False):
            A, B = lora_A.to(base_squared.dtype), lora_B.to(base_squared.dtype)
            value = torch.maximum(row_norms(weight, base_squared, A, B, scaling), floor(base_squared))
    return _WeightNorm.apply(lora_A, lora_B, weight, value, scaling)


def attach_norm_gradient(norm: Tensor, matrix: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """v [out] unchanged, with its gradient with respect to A and B by plain operations, for torch.compile.

    Args:
        norm: v [out], without gradient.
        matrix: W0 [out, in].
    """
    A, B = lora_A.to(norm.dtype), lora_B.to(norm.dtype)
    cross = (F.linear(matrix.to(norm.dtype), A) * B).sum(1)
    # v^2 - ||W0||^2
    varying = 2 * scaling * cross + scaling * scaling * (F.linear(B, A @ A.T) * B).sum(1)
    return norm + (varying - varying.detach()) / (2 * norm)


def scale(magnitude: Tensor, norm: Tensor, tied: Tensor | None) -> Tensor:
    """c [out] = m / v, 1 on tied rows; equals `reference.scale`. `norm` is floored, so nothing divides by zero."""
    if tied is None:
        return magnitude / norm
    # v of a tied row may be 1e-30, and backward divides by its square
    return torch.where(tied, torch.ones_like(norm), magnitude / norm.masked_fill(tied, 1.0))
