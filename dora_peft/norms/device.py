"""v on a device with kernels: the check decides there, so that no forward pass waits for the host.

What only the host knows (another s, another version of the base weight) it passes on as "due"; whether A, B or a sample
of W0 hold something new is decided by sums that the device makes and compares (kernels/norm.py). Of another tensor as
base weight, as sharding and offloading bring one, all is summed: identity alone refreshes nothing. Every forward pass
gets its own v, and what the device remembers is written by the check alone. What was checked for all layers of the
model at the start of its forward pass is taken from there, see grouped.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..bases import BaseWeight
from ..ops import choice
from ..ops.content import version
from . import grouped
from .adapted import AdaptedLayer
from .records import DeviceNorm, Norm, Stored


def check(
    layer: AdaptedLayer,
    norm: Norm,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stored: Stored,
    seam: Callable[[], BaseWeight],
) -> Tensor | None:
    """A new v [out] of these factors, s and W0, or None if no kernel can read W0.

    Args:
        norm: The adapter's record, which keeps the device's memory.
        stored: W0 as stored in the layer, or the tensor in its place.
        seam: Gives the `BaseWeight` of `stored`.
    """
    gathered = grouped.take(norm, lora_A, lora_B, scaling, stored)
    if gathered is not None:
        return gathered
    known, kernels = norm.device, choice.norm_kernels()
    address = stored.data_ptr() if isinstance(stored, Tensor) else 0
    count = version(stored) if isinstance(stored, Tensor) else None
    another = known is None or known.weight() is not stored
    due = known is None or known.scaling != scaling or (not another and known.version != count)
    if known is None or another or due or known.address != address:
        matrix = seam()
        readable = matrix.stored()
        if readable is None or not choice.uses_kernels(matrix.device, matrix.dtype, readable.dtype):
            return None
        fits = known is not None and known.memory.remembered.device == matrix.device
        memory = known.memory if known is not None and fits else kernels.Memory(matrix.out_features, matrix.device)
        due = due or not fits
        known = DeviceNorm(memory, readable, weakref.ref(stored), count, address, scaling)
    norm.device = known
    A, B = (factor.detach() for factor in layer.as_matrices(lora_A, lora_B))
    return kernels.checked_norm(known.memory, known.stored, A, B, float(scaling), due=due, another=another)


def follow(magnitude: Tensor, tied: Tensor, value: Tensor) -> None:
    """m = v on tied rows, in place and past the version counter, without asking how many there are.

    Args:
        value: v [out], at least 1e-30, which stands for 0.
    """
    flat = magnitude.data.view(-1)
    value = torch.where(value > 1e-30, value, 0).to(flat.dtype)
    flat.copy_(torch.where(tied, value, flat))
