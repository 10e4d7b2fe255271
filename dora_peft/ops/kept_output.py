"""A layer's output y, kept for its backward pass, and whether it still is what the layer wrote.

The magnitude's gradient is sum_n g (y - b) / m, and the next operation often keeps y anyway, so that keeping it costs
nothing. But y is not ours alone: a consumer may change it in place, which moves its version counter, and a fused kernel
may write over it by raw pointer, which moves nothing (Liger's SwiGLU writes its gradients there, its RoPE rotates q and
k). So y is believed only if its content is what was written:

    - its version counter has not moved;
    - the incoming gradient does not share its memory;
    - some whole rows, and one element of nearly every token along a diagonal (of 4,096 tokens, if there are more),
      from places drawn each time, hold the bits that the forward pass copied from there. Whole rows see a kernel
      that writes some columns of all tokens, the diagonal one that writes all columns of some tokens. What writes
      neither (a few columns of a few tokens, one token at an end) may go unseen.

If it is not, the layer computes z = (y - b) / c again, in that very backward pass. From then on it keeps a copy or
computes z again each time, as overwritten.py says. What is saved for backward has the same number,
order, shapes and dtypes in every case: checkpointing, which runs the forward pass twice, counts them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

from . import overwritten, torch_names
from .content import MEMCMP, same_bits, version
from .overwritten import Outputs

# Not torch's or Python's global generators, whose numbers belong to the user.
_random = random.Random()
# Elements of y that are kept as whole rows, but at least so many rows, and along the diagonal: 1 % of y at 512 tokens
# of 512 features.
_ROWS, _FEWEST, _DIAGONAL = 2048, 4, 4096


class SampleKernels(Protocol):
    """What copies and compares on a device, see kernels/."""

    def take_sample(
        self, y: Tensor, offset: int, start: int, step: int, size: int, count: int
    ) -> tuple[Tensor, Tensor]: ...

    def compare_sample(
        self, y: Tensor, rows: Tensor, diagonal: Tensor, offset: int, start: int, step: int
    ) -> Tensor: ...


class SamplePlan(Protocol):
    """The same for outputs of one layout, see kernels/plan.py."""

    def keep_sample(self, y: Tensor) -> tuple[Tensor, int, int]: ...

    def find_change(self, y: Tensor, kept: Tensor, offset: int, start: int) -> None: ...


class KeptOutput:
    """One output y [..., out], from the forward pass to the backward pass of its layer.

    Attributes:
        alias: y without its graph node, on which y would be a reference cycle; None once it was read.
        address: Where its memory begins, 0 if `read` has to compare.
        version: Its version counter when it was kept, None if a copy or nothing is kept instead.
        saved: The tensors to save for backward and to give to `read`: rows [k, out] and a diagonal [d] of y, None if
            the rows are all; under saved-tensor hooks (checkpointing, offloading) also the places [2] of these, and y.
        differing_rows, equal_diagonal: Calls of C that compare y with its copies: 0 and True if nothing was written.
    """

    __slots__ = (
        "address",
        "alias",
        "differing_rows",
        "equal_diagonal",
        "kernels",
        "outputs",
        "places",
        "saved",
        "through_hooks",
        "version",
    )

    differing_rows: Callable[[], int]
    equal_diagonal: Callable[[], bool]
    alias: Tensor | None
    saved: list[Tensor | None]
    version: int | None

    def __init__(self, y: Tensor, outputs: Outputs, kernels: SampleKernels | None = None) -> None:
        """Keep an output.

        Args:
            y: The output, just written.
            outputs: What is known about the layer.
            kernels: Those that copy and compare on the device, None for torch's operations.
        """
        if outputs.pending is not None:
            outputs.learn()
        self.outputs, self.kernels = outputs, kernels
        self.through_hooks = torch_names.top_hooks is None or torch_names.top_hooks(True) is not None
        self.address, self.version = 0, None
        if outputs.overwritten or self.through_hooks or kernels is not None or not (y.is_cpu and y.is_contiguous()):
            self._keep_otherwise(y)
            return
        self.alias = alias = y.detach()
        self.version = version(y)
        length, width, count, step, elements = layout(y.shape)
        if elements:
            self.places = places = draw(length, width, count, step, elements)
            rows, diagonal = _parts(alias, *places)
            kept_rows, kept_diagonal = rows.clone(), diagonal.clone()
            self.saved, self.equal_diagonal = [kept_rows, kept_diagonal], partial(torch.equal, diagonal, kept_diagonal)
        else:
            # of few tokens all rows are kept
            rows, kept_rows, self.places = alias, alias.clone(), (0, 0)
            self.saved, self.equal_diagonal = [kept_rows, None], partial(bool, True)
        if MEMCMP is not None:
            self.address = alias.untyped_storage().data_ptr()
            self.differing_rows = partial(MEMCMP, rows.data_ptr(), kept_rows.data_ptr(), kept_rows.nbytes)

    def _keep_otherwise(self, y: Tensor) -> None:
        """For a device, saved-tensor hooks, other layouts, and outputs that are known to be overwritten."""
        kept, ordered = y, in_memory_order(y)
        if not self.outputs.overwritten and ordered is not None:
            self.version = version(y)
        elif overwritten.chosen == "copy" and ordered is not None:
            kept = y.clone()
        else:
            # NaN, which no sample matches: a checkpoint may give it to the graph of a pass that did keep y
            kept = y.new_full((), torch.nan).expand(y.shape)
        ordered = y.contiguous() if ordered is None else ordered
        length, width, count, step, elements = layout(ordered.shape)
        places = draw(length, width, count, step, elements)
        if self.kernels is not None:
            rows, diagonal = self.kernels.take_sample(
                ordered, places[0] * width, places[1], step, count * width, elements
            )
            rows = rows.view(count, width)
        else:
            rows, diagonal = (part.clone() for part in _parts(ordered, *places))
        self.saved = [rows, diagonal if len(diagonal) else None]
        self.alias, self.places = kept.detach(), places
        if self.through_hooks:
            # y has to go through the hooks, which switch off torch's own check for changes in place; the alias keeps
            # y's version counter and lets go of its storage. The places too: those of the pass that is run again, as
            # a tensor on the CPU, which is read without waiting.
            self.alias.data = y.new_empty(0)
            self.saved += [torch.tensor(places, device="cpu"), kept]

    def read(self, saved: list[Tensor | None], grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What was kept, if it still is what the layer wrote.

        Args:
            saved: The tensors of `saved`, unpacked.
            grad: dL/dy.

        Returns:
            y, or None if it is known to be overwritten; and if the device compares, a number [1] there that is not 0
            if y turns out to be overwritten, else None.
        """
        self.outputs.announce()
        rows, diagonal, *through_hooks = saved
        alias, y, places = self.alias, self.alias, self.places
        assert rows is not None
        if through_hooks:
            kept_places, y = through_hooks
            assert kept_places is not None
            first, second = kept_places.tolist()
            places = first, second
        else:
            # y goes as the saved tensors do; a second pass over the graph computes it again
            self.alias, self.address, self.equal_diagonal = None, 0, bool
        if alias is None or y is None:
            return None, None
        ordered = in_memory_order(y)
        if ordered is None:
            # a stand-in: y was not kept
            return None, None
        if self.version is not None and version(alias) != self.version:
            # by an operation of torch's in place, which says so each time
            return None, None
        shared = _share_memory(y, grad)
        if self.kernels is not None:
            diagonal = rows[:0] if diagonal is None else diagonal
            gone = self.kernels.compare_sample(ordered, rows, diagonal, *sampled(ordered.shape, places)[:3])
            if self.outputs.asks():
                self.outputs.notice_later(gone)
            return (None, None) if shared else (y, gone)
        found = _parts(ordered, *places)
        if same_bits(found[0].view(rows.shape), rows) and (
            diagonal is None or same_bits(found[1].contiguous(), diagonal)
        ):
            return (None if shared else y), None
        self.outputs.notice()
        self.outputs.announce()
        return None, None


class KeptOnDevice:
    """`KeptOutput` for the usual case of a device with kernels, prepared: a new, contiguous y of a layer whose outputs
    nobody overwrites, without saved-tensor hooks.

    Attributes:
        alias, version: As there.
        offset, start: Where `sample` is from, as `SampleKernels` takes it.
        sample: To save for backward and to give to `read`.
    """

    __slots__ = ("alias", "offset", "outputs", "plan", "sample", "start", "version")

    def __init__(self, y: Tensor, outputs: Outputs, plan: SamplePlan) -> None:
        self.outputs, self.plan = outputs, plan
        self.sample, self.offset, self.start = plan.keep_sample(y)
        self.alias: Tensor | None = y.detach()
        self.version = None if y.is_inference() else y._version

    def read(self, sample: Tensor, grad: Tensor) -> tuple[Tensor | None, bool]:
        """y, or None if it is known to be overwritten, and whether the device has written down in `sample` if it turns
        out to be; see `KeptOutput.read`."""
        self.outputs.announce()
        # a second pass over the graph computes it again
        y, self.alias = self.alias, None
        if y is None or (self.version is not None and y._version != self.version):
            return None, False
        self.plan.find_change(y, sample, self.offset, self.start)
        return (None if _share_memory(y, grad) else y), True


def is_kept_plainly(outputs: Outputs) -> bool:
    """Whether a layer with these outputs may keep the next one as `KeptOnDevice`."""
    if outputs.pending is not None:
        outputs.learn()
    return not (outputs.overwritten or torch_names.top_hooks is None or torch_names.top_hooks(True) is not None)


def in_memory_order(y: Tensor) -> Tensor | None:
    """y as a contiguous view of its memory: itself, or one of a layout of images; None for any other."""
    if y.is_contiguous():
        return y
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        return y.permute(0, 2, 3, 1)
    if y.dim() == 5 and y.is_contiguous(memory_format=torch.channels_last_3d):
        return y.permute(0, 2, 3, 4, 1)
    return None


def sampled(shape: torch.Size, places: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """What `SampleKernels` copies of an output of this shape: the first element of the rows, that of the diagonal, how
    far apart the diagonal's elements are, and how many elements both have."""
    _, width, count, step, elements = layout(shape)
    first, start = places
    return first * width, start, step, count * width, elements


def sampled_by(shape: torch.Size, seed: int) -> tuple[int, int, int, int, int]:
    """`sampled` at places that `seed` draws: in a compiled graph a random number would be a constant anyway."""
    return sampled(shape, draw(*layout(shape), random.Random(seed)))


@lru_cache(maxsize=256)
def layout(shape: torch.Size) -> tuple[int, int, int, int, int]:
    """Of an output [..., out]: its tokens and width, how many rows are compared, how far apart the elements of the
    diagonal are, one column further in each token, and how many they are."""
    length, width = math.prod(shape[:-1]), shape[-1]
    count, elements = sample_sizes(length, width)
    return length, width, count, _diagonal_step(length, width) if elements else 1, elements


def sample_sizes(length: int, width: int) -> tuple[int, int]:
    """How many rows and how many elements of a diagonal are compared of an output [length, width]."""
    rows = max(_FEWEST, _ROWS // width) if width else 0
    if not width or length <= rows:
        return length, 0
    return rows, max(1, length * width // _diagonal_step(length, width))


def _diagonal_step(length: int, width: int) -> int:
    return max(1, length // _DIAGONAL) * width + 1


def draw(
    length: int, width: int, count: int, step: int, elements: int, generator: random.Random = _random
) -> tuple[int, int]:
    """A random row to start from, and a random element."""
    if not elements:
        return 0, 0
    first = int(generator.random() * (length - count + 1))
    return first, int(generator.random() * (length * width - (elements - 1) * step))


def _parts(y: Tensor, first: int, start: int) -> tuple[Tensor, Tensor]:
    """Rows [k, out] from row `first` on, and a diagonal [d] from element `start` on, as views of a contiguous y."""
    _, width, count, step, elements = layout(y.shape)
    offset = y.storage_offset()
    rows = y.as_strided((count, width), (width, 1), offset + first * width)
    return rows, y.as_strided((elements,), (step,), offset + start)


def _share_memory(y: Tensor, grad: Tensor) -> bool:
    try:
        address = y.untyped_storage().data_ptr()
        return address != 0 and grad.untyped_storage().data_ptr() == address
    except (RuntimeError, NotImplementedError):
        # a tensor that has no storage
        return False
