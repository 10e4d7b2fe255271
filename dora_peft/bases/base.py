"""What every kind of base weight offers: W0 as a [out, in] matrix, read a block of rows at a time, and written.

A new kind of base provides `block`; or, if its rows cannot be read, the first three of

    row_norms_squared()   ||W0||^2 per output row      [out]
    times(A)              W0 A^T                       [out, r]
    vjp(g)                g^T W0                       [r, in]       for detach_norm=False, and bases without dL/dx
    rows(index)           dense rows of W0             [k, in]       rows whose norm cancels, or whose output lost c
    stored()              what kernels read W0 from                  None if they cannot

and to be merged into, `replacement` and, if another parameter is not enough, `keep_original`, `install` and `restore`.

W0 is read in blocks of about BLOCK_BYTES, but for grouped convolutions in low precision, weights that their library
can only dequantise as a whole, and `dense`; `replacement` makes the new weight. Sums are accumulated in fp32 (fp64 for
an fp64 base). A convolution's kernel is flattened: in = in_channels * prod(kernel_size). An embedding's rows are its
dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import scratch

# One dense block in the accumulation dtype. Four may be alive together (rows, product, sum, square): below 64 MiB in
# all.
BLOCK_BYTES = scratch.CAPACITY


class FourBit(NamedTuple):
    """A 4-bit weight as it is stored: element i is code[nibble i] * absmax[i // blocksize], rounded to `dtype`.

    Attributes:
        packed: uint8 [out in / 2], the even elements in the upper halves.
        absmax: fp32 [out in / blocksize].
        code: fp32 [16].
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class BaseWeight:
    """W0 as [out, in] rows.

    Attributes:
        out_features, in_features: The sizes of the matrix.
        dtype: What sums are accumulated in, and what every method returns.
        device: Where the weight is, or is brought when it is read.
        dense_rows: How many rows in `dtype` fit into BLOCK_BYTES, for copies and products of them.
        block_rows: How many rows `blocks` reads at a time: as many, or more if a block is a view.
        copies: Whether `block` makes its rows anew, and into `memory` if it gets some.
        has_rows: Whether `block`, `rows` and `dense` are available.
        has_blocks: Whether rows that `block` gives lie next to each other in memory, at little cost.
        mergeable: Whether `replacement` can write a new weight.
    """

    has_rows = True
    has_blocks = False
    copies = False
    mergeable = True

    def __init__(self, out_features: int, in_features: int, acc_dtype: torch.dtype, device: torch.device) -> None:
        self.out_features, self.in_features = out_features, in_features
        # of a block, where that is not all of a row
        self.row_elements = in_features
        self.dtype, self.device = acc_dtype, device
        self.dense_rows = self.block_rows = max(1, BLOCK_BYTES // (in_features * acc_dtype.itemsize))

    def block(self, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        """Rows start:stop, [stop - start, in], in the accumulation dtype; may alias the weight, so read only.

        Args:
            start, stop: The rows.
            memory: Where to make them if the weight `copies`, see `lend`.
        """
        raise NotImplementedError

    def lend(self, rows: int) -> AbstractContextManager[Tensor | None]:
        """Memory for blocks of up to so many rows, None if they need none, see scratch.py."""
        if not self.copies:
            return nullcontext()
        return scratch.lent(min(rows, self.out_features) * self.row_elements, self.dtype, self.device)

    def stored(self) -> Tensor | FourBit | None:
        """What a kernel reads W0 from: a matrix [out, in] of any strides, its 4-bit form, or None if it cannot."""
        return None

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """All of W0 as (start, stop, rows start:stop), which are gone when the next ones are asked for."""
        with self.lend(self.block_rows) as memory:
            for start in range(0, self.out_features, self.block_rows):
                stop = min(start + self.block_rows, self.out_features)
                yield start, stop, self.block(start, stop, memory)

    def rows(self, index: Tensor) -> Tensor:
        """The rows of `index` [k], densely: [k, in]."""
        out = torch.empty(len(index), self.in_features, dtype=self.dtype, device=self.device)
        for position, i in enumerate(index.tolist()):
            out[position] = self.block(i, i + 1)[0]
        return out

    def dense(self) -> Tensor:
        """W0 itself, [out, in]; for the reference implementation and recordings only."""
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            out[start:stop] = rows
        return out

    def row_norms_squared(self) -> Tensor:
        """||W0||^2 per output row, [out]."""
        out = torch.empty(self.out_features, dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            torch.linalg.vector_norm(rows, dim=1, out=out[start:stop])
        return out.square_()

    def times(self, lora_A: Tensor) -> Tensor:
        """W0 A^T, [out, r], for A [r, in]."""
        if self.block_rows >= self.out_features:
            with self.lend(self.out_features) as memory:
                return self.block(0, self.out_features, memory) @ lora_A.T
        out = torch.empty(self.out_features, lora_A.shape[0], dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            torch.mm(rows, lora_A.T, out=out[start:stop])
        return out

    def vjp(self, grad: Tensor) -> Tensor:
        """grad^T W0, [r, in], for grad [out, r]."""
        out = torch.zeros(grad.shape[1], self.in_features, dtype=self.dtype, device=self.device)
        for start, stop, rows in self.blocks():
            out.addmm_(grad[start:stop].T, rows)
        return out

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> nn.Parameter:
        """A new weight parameter whose rows start:stop are `rows(block, start, stop)`, of the base's own kind.

        The block is a copy of those of W0, which `rows` may write to and return.
        """
        raise NotImplementedError

    def keep_original(self, layer: nn.Module, offload: bool) -> nn.Parameter:
        """The weight parameter of `layer`, in a state from which `restore` brings it back bit for bit.

        Args:
            layer: The base layer.
            offload: Keep it on the CPU if it is dense; a quantised one stays where it is.
        """
        return layer.get_parameter("weight")

    def install(self, layer: nn.Module, weight: nn.Parameter) -> None:
        """Have `layer` compute with `weight`, a parameter of the kind that `replacement` gives."""
        layer.weight = weight

    def restore(self, layer: nn.Module, original: nn.Parameter) -> None:
        """Put the parameter that `keep_original` gave in the place of the installed one."""
        self.install(layer, original)
