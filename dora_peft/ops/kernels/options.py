"""What the linear layer's kernels are given besides tensors. Importing this file alone does not import Triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# What a dropout mask is drawn from: a number, or an int64 tensor [1] on the device.
Seed = int | Tensor


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What `fused.forward` and `fused.gradients` are given besides tensors.

    Attributes:
        k: s / (1 - p), by the exact probability to keep an element.
        p: Probability to drop an element of x before A.
        seed: Of the dropout mask, None without dropout.
        needed: Whether x, base_out, bias, A, B and c need a gradient.
    """

    k: float
    p: float
    seed: Seed | None
    needed: tuple[bool, ...]

    @classmethod
    def of(cls, scaling: float, p: float, seed: Seed | None, needed: tuple[bool, ...]) -> KernelOptions:
        """The options for s = `scaling`."""
        kept = 1.0 if seed is None else threshold(p)[1]
        return cls(scaling / kept if kept else 0.0, p, seed, needed)


def threshold(p: float) -> tuple[int, float]:
    """The number of the 2^16 draws that are dropped, and the exact probability to keep an element."""
    dropped = round(p * 2**16)
    return dropped, 1 - dropped / 2**16
