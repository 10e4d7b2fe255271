"""The best approximation of one module's update dW = (c - 1) W0 + s c (B A) of every rank, by a randomised SVD.

dW is read a block of rows at a time and is never in memory as a whole, unless it is no larger than a block. The basis
Q [out, l] of its range is made by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4: a QR after each
product, as powers of dW would lose what is small). With U the left singular vectors of dW D in it,

    B A = U_k U_k^T dW     minimises ||(dW - B A) D||_F over rank k, where D = 1 or the root of the inputs' mean square.

It is a projection whatever D is, so that no D is inverted, and ||dW - B A||_F^2 = ||dW||_F^2 - ||U_k^T dW||_F^2 holds
without weights too: one run gives the error at every rank.

Products are in fp32, the small factorisations in fp64. Random numbers come from a generator of a fixed seed on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats import UnreadableError

# Columns of the sketch beyond the rank, and an eighth of it, and how often it is multiplied by dW dW^T: within 1.2 % of
# the optimum's error at rank 512 of a flat spectrum of 2048, where 10 columns leave 3 %.
OVERSAMPLING = 32
ITERATIONS = 2
SEED = 0
# An update no larger than this is kept, as it would be a block anyway.
HELD_BYTES = 64 * 2**20
# Of the mean weight: what inputs that the calibration never saw count, so that D has full rank.
FLOOR = 1e-6


class Change(Protocol):
    """What an adapter changes in one module.

    Attributes:
        path: The module's path in the base model.
        out_features, in_features: Of dW. An embedding's rows are its dimensions, a kernel is flattened.
        embedding: Whether the module is an embedding.
        kernel: (in_channels / groups, kernel sizes ...) of a convolution; () otherwise.
    """

    path: str
    out_features: int
    in_features: int
    embedding: bool
    kernel: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows start:stop of dW in fp32); may be walked several times, and may reuse a block's memory."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the part of low rank, s c (B A), with s and c inside B."""

    def scale_change(self) -> Tensor:
        """c - 1, [out]."""


@dataclass(frozen=True)
class LowRank:
    """The approximation of one update at every rank up to the largest.

    Attributes:
        lora_B, lora_A: U [out, k] and U^T dW [k, in], fp32; the first j columns and rows are the optimum of rank j.
        norm: ||dW||_F.
        scale_norm: ||(c - 1) W0||_F, the part of dW that is in general of full rank.
        energies: ||u_i^T dW||^2 [k], fp64.
        weighted: ||u_i^T dW D||^2 [k], fp64, the squared singular values of dW D; the same without weights.
        weighted_norm: ||dW D||_F.
    """

    lora_B: Tensor
    lora_A: Tensor
    norm: float
    scale_norm: float
    energies: Tensor
    weighted: Tensor
    weighted_norm: float

    @property
    def singular_values(self) -> Tensor:
        """Of dW D, [k], in descending order."""
        return self.weighted.sqrt()

    def error(self, rank: int) -> float:
        """||dW - B A||_F at a rank, unweighted, before the factors are rounded.

        By subtraction of squares, so that less than 1e-3 ||dW||_F is not resolved: `measured_errors` resolves it.
        """
        return _rest(self.norm, self.energies[:rank])

    def weighted_error(self, rank: int) -> float:
        """||(dW - B A) D||_F at a rank, before the factors are rounded, and to the same resolution."""
        return _rest(self.weighted_norm, self.weighted[:rank])


def _rest(norm: float, energies: Tensor) -> float:
    return float((norm**2 - energies.sum()).clamp_min(0).sqrt())


def approximate(
    change: Change, rank: int, weight: Tensor | None = None, *, iterations: int = ITERATIONS, seed: int = SEED
) -> LowRank:
    """The best B A of every rank up to `rank` or the matrix' own.

    Equivalent, without weights, to `U, S, Vh = torch.linalg.svd(dW)` cut off, with B = U and A = S Vh.

    Args:
        change: The module.
        rank: The largest that is wanted.
        weight: D^2: the mean square of each input feature [in], or the inputs' second moments [in, in].
        iterations: Of the subspace.
        seed: Of the sketch.

    Raises:
        UnreadableError: dW or the weight is not finite, or the weight is of another shape or indefinite.
    """
    rows = _Rows(change)
    out, columns = change.out_features, change.in_features
    root = None if weight is None else _Root(change, weight, rows.device)
    smallest = min(out, columns)
    width = min(rank + OVERSAMPLING + rank // 8, smallest)
    if 2 * width > smallest and rows.held:
        # no dearer than to iterate, and exact
        width = smallest
    basis: Tensor | None = None
    if width == columns < out:
        basis = torch.linalg.qr(rows.dense()).Q
    elif width < out:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(columns, width, generator=generator).to(rows.device)
        basis = _iterated(rows, root, sketch, iterations)
    # [in, l]
    image = rows.transposed_times(basis)
    turned = image if root is None else root.transposed_times(image)
    weighted, vectors = _eigen(turned, rank)
    lora_A = vectors.T.to(image.dtype) @ image.T
    lora_B = vectors.to(image.dtype) if basis is None else basis @ vectors.to(image.dtype)
    norm, scale_norm, columns_squared = rows.norms()
    weighted_norm = norm if root is None else root.norm(rows, columns_squared)
    energies = lora_A.double().square().sum(1).cpu()
    return LowRank(lora_B, lora_A, norm, scale_norm, energies, weighted.cpu(), weighted_norm)


def _iterated(rows: _Rows, root: _Root | None, sketch: Tensor, iterations: int) -> Tensor:
    """An orthonormal basis Q [out, l] of the range of (dW D D^T dW^T)^iterations dW D, from a sketch [in, l]."""
    for step in range(iterations + 1):
        basis = torch.linalg.qr(rows.times(sketch if root is None else root.times(sketch))).Q
        if step < iterations:
            image = rows.transposed_times(basis)
            sketch = torch.linalg.qr(image if root is None else root.transposed_times(image)).Q
    return basis


def _eigen(image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest squared singular values of (Q^T dW D)^T [in, l] and its right vectors [l, k], fp64."""
    width = image.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=image.device)
    # in pieces: an embedding has as many inputs as there are tokens
    for piece in image.split(8192):
        wide = piece.double()
        gram.addmm_(wide.T, wide)
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]


class _Rows:
    """dW of a module, whose blocks are walked for each product, or kept if they are few bytes."""

    def __init__(self, change: Change) -> None:
        self.change = change
        out, columns = change.out_features, change.in_features
        self.held = 4 * out * columns <= HELD_BYTES
        self._kept: Tensor | None = None
        self.device = torch.device("cpu")
        self._measure()

    def _measure(self) -> None:
        """One walk: norms per column, that of the part (c - 1) W0, and the rows themselves if they are kept."""
        change = self.change
        lora_A, lora_B = (factor.float() for factor in change.factors())
        squared = torch.zeros(change.in_features, dtype=torch.float64)
        scale = torch.zeros((), dtype=torch.float64)
        for start, stop, rows in change.blocks():
            if start == 0:
                self.device = rows.device
                squared, scale, lora_A, lora_B = (t.to(rows.device) for t in (squared, scale, lora_A, lora_B))
                if self.held:
                    self._kept = torch.empty(change.out_features, change.in_features, device=rows.device)
            if self._kept is not None:
                self._kept[start:stop] = rows
            squared += rows.square().sum(0, dtype=torch.float64)
            scale += torch.addmm(rows, lora_B[start:stop], lora_A, alpha=-1).square().sum(dtype=torch.float64)
        self._squared, self._scale = squared, float(scale)
        if not bool(torch.isfinite(squared).all()):
            raise UnreadableError(
                f"The update of module '{change.path}' holds NaN or infinite values, or such that overflow when "
                "squared: expected finite ones. Use an earlier checkpoint of the adapter."
            )

    def norms(self) -> tuple[float, float, Tensor]:
        """||dW||_F, ||(c - 1) W0||_F and the squared norms of dW's columns [in]."""
        return float(self._squared.sum().sqrt()), self._scale**0.5, self._squared

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        if self._kept is None:
            yield from self.change.blocks()
        else:
            yield 0, len(self._kept), self._kept

    def dense(self) -> Tensor:
        """dW [out, in], for a basis of all of its columns, which is as large."""
        if self._kept is not None:
            return self._kept
        whole = torch.empty(self.change.out_features, self.change.in_features, device=self.device)
        for start, stop, rows in self.blocks():
            whole[start:stop] = rows
        return whole

    def times(self, factor: Tensor) -> Tensor:
        """dW X, [out, l] of X [in, l]."""
        product = torch.empty(self.change.out_features, factor.shape[1], device=self.device)
        for start, stop, rows in self.blocks():
            torch.mm(rows, factor, out=product[start:stop])
        return product

    def transposed_times(self, factor: Tensor | None) -> Tensor:
        """dW^T Q, [in, l] of Q [out, l]; dW^T if Q is None, for the identity."""
        if factor is None:
            return self.dense().T
        product = torch.zeros(self.change.in_features, factor.shape[1], device=self.device)
        for start, stop, rows in self.blocks():
            product.addmm_(rows.T, factor[start:stop])
        return product


class _Root:
    """D with D D^T = the weight: a diagonal, or a Cholesky factor, of a module's inputs."""

    def __init__(self, change: Change, weight: Tensor, device: torch.device) -> None:
        columns = change.in_features
        if weight.shape not in ((columns,), (columns, columns)):
            raise UnreadableError(
                f"The weights of module '{change.path}' are {list(weight.shape)}: expected [{columns}], the mean "
                f"square of each input feature, or [{columns}, {columns}], their second moments."
            )
        weight = weight.to(device, torch.float64)
        self.full = weight.dim() > 1
        power = weight.diagonal() if self.full else weight
        mean = power.mean()
        if not bool(torch.isfinite(weight).all()) or bool((power < 0).any()):
            raise UnreadableError(
                f"The weights of module '{change.path}' hold NaN, infinite or negative values: expected mean squares "
                "of its inputs."
            )
        if mean == 0:
            # never reached by the calibration: nothing is known of its inputs
            weight, self.full, mean = torch.ones_like(power), False, torch.ones_like(mean)
        floor = FLOOR * mean
        if not self.full:
            self.matrix = (weight + floor).sqrt().float()
            return
        weight = weight.clone()
        added = torch.zeros_like(mean)
        # sums in fp32 leave negative eigenvalues where a text has fewer tokens than a module has inputs
        for share in (FLOOR, 10 * FLOOR, 100 * FLOOR, 1000 * FLOOR):
            weight.diagonal().add_(share * mean - added)
            added = share * mean
            factor, failed = torch.linalg.cholesky_ex(weight)
            if not int(failed):
                break
        else:
            raise UnreadableError(
                f"The second moments of the inputs of module '{change.path}' are not positive: expected X^T X of "
                "calibration data. Use more text, or mean squares alone."
            )
        self.matrix = factor.float()

    def times(self, factor: Tensor) -> Tensor:
        return self.matrix @ factor if self.full else self.matrix[:, None] * factor

    def transposed_times(self, factor: Tensor) -> Tensor:
        return self.matrix.T @ factor if self.full else self.matrix[:, None] * factor

    def norm(self, rows: _Rows, columns_squared: Tensor) -> float:
        """||dW D||_F, from the squared norms of dW's columns if D is diagonal."""
        if not self.full:
            return float((columns_squared * self.matrix.double().square()).sum().sqrt())
        squares = (torch.mm(block, self.matrix).square().sum(dtype=torch.float64) for _, _, block in rows.blocks())
        return float(torch.stack(list(squares)).sum().sqrt())


def measured_errors(change: Change, lora_A: Tensor, lora_B: Tensor, ranks: tuple[int, ...]) -> dict[int, float]:
    """||dW - B A||_F^2 of the first k rows of A and columns of B, for each k in `ranks`, from one walk over dW.

    Args:
        change: The module.
        lora_A, lora_B: As they are written, in any dtype: [k, in] and [out, k].
        ranks: In ascending order; those above k are as k.
    """
    sums = dict.fromkeys(ranks, 0.0)
    for start, stop, rows in change.blocks():
        rest, done = rows.clone(), 0
        wide_A, wide_B = lora_A.to(rows.device, torch.float32), lora_B[start:stop].to(rows.device, torch.float32)
        for rank in ranks:
            if done < min(rank, len(lora_A)):
                rest.addmm_(wide_B[:, done:rank], wide_A[done:rank], alpha=-1)
            done = rank
            sums[rank] += float(rest.square().sum(dtype=torch.float64))
    return sums


# The weight of a module by its path: None fits it without.
Weights = Callable[[str], Tensor | None]
