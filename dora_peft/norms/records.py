"""What a layer knows about its norms: plain records, which the rest of this folder makes, compares and drops."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..bases.inspection import parts
from ..ops.content import Bits, Fingerprint
from ..ops.content import Weight as Stored

if TYPE_CHECKING:
    from ..bases import FourBit
    from ..ops.kernels.norm import Memory


@dataclass(frozen=True, slots=True)
class BaseNorm:
    """||W0||^2 per output row, and the smallest v that is divided by, both [out], with the weight they belong to.

    `parts` are those of the tensors that W0 is made from besides, None for a layer that never has any, see
    `inspection.parts`.
    """

    squared: Tensor
    floor: Tensor
    weight: Fingerprint
    parts: tuple[Fingerprint, ...] | None

    def made_from(self, base_layer: nn.Module) -> bool:
        """Whether the parts of the layer's weight still are what they were."""
        if self.parts is None:
            return True
        tensors = parts(base_layer)
        if tensors is None or len(tensors) != len(self.parts):
            return False
        return all(part.fits(tensor) for part, tensor in zip(self.parts, tensors, strict=True))


# A device makes one in each forward pass: a tuple takes a fifth of the time that a frozen dataclass does.
class Snapshot(NamedTuple):
    """v and all that it was computed from. Never changed: another content gets another one.

    Attributes:
        value: v [out], fp32 (fp64 for an fp64 base), floored if it vanishes over a non-zero row of W0.
        tied: Rows whose magnitude follows their norm [out, bool], None if there are none.
        lora_A, lora_B: What A and B held; None for an adapter of magnitudes alone, whose factors are 0.
        base: None for a v that a device checks, or on the meta device: it is not looked up again.
        by_kernels: Whether Triton's kernels computed it. They round differently, so that a change of implementation
            needs another one.
    """

    value: Tensor
    tied: Tensor | None
    lora_A: Bits | None
    lora_B: Bits | None
    scaling: float
    base: BaseNorm | None
    by_kernels: bool


@dataclass(slots=True)
class DeviceNorm:
    """What the host knows of one v that a device remembers.

    Attributes:
        memory: The device's.
        stored: W0 as kernels read it, see `BaseWeight.stored`.
        weight, version, address: The base weight that `stored` is a view of.
        scaling: s of the last check.
    """

    memory: Memory
    stored: Tensor | FourBit
    weight: weakref.ref[Stored]
    version: int | None
    address: int
    scaling: float


@dataclass(frozen=True, slots=True)
class Folded:
    """c and the factors of one adapter as evaluation multiplies by them.

    Attributes:
        lora_B: c * B [out, r], by kernels s c * B, in the base's compute dtype.
        alpha: s, by kernels 1.
        c: m / v [out].
        lora_A: A [r, in] in the base's compute dtype, None if A has it already.
        known: What v, A, B and s these belong to.
        magnitude: What m held.
    """

    lora_B: Tensor
    alpha: float
    c: Tensor
    lora_A: Tensor | None
    known: Snapshot
    magnitude: Bits

    def fits(self, known: Snapshot, magnitude: Tensor) -> bool:
        """Whether it belongs to this norm, and to m [out] as it is now."""
        return self.known is known and self.magnitude.fits(magnitude)


@dataclass
class Norm:
    """What a layer knows about the norm of one adapter. A copy, or another process, computes it again.

    Attributes:
        tied: Rows whose magnitude follows their norm [out, bool], None if there are none.
        settled: Whether `tied` is known: from creation on, or read at loading; otherwise guessed at the first use.
        known: The last v, None if there is none yet.
        folded: What evaluation keeps, see evaluation.py.
        device: What a device remembers, see device.py.
    """

    tied: Tensor | None = None
    settled: bool = False
    known: Snapshot | None = None
    folded: Folded | None = None
    device: DeviceNorm | None = None

    def renew(self, known: Snapshot) -> Snapshot:
        """Take a v that has just been computed; what evaluation folded by the last one goes with it."""
        self.known, self.folded = known, None
        return known

    def __getstate__(self) -> dict[str, object]:
        return {"tied": self.tied, "settled": self.settled, "known": None, "folded": None, "device": None}
