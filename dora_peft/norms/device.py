"""v on a device with kernels: the check decides there, so that no forward pass waits for the host.

What only the host knows (another s, another version of the base weight) it passes on as "due"; whether A, B or a sample
of W0 hold something new is told by sums that the device makes and compares (norm_kernels.py). Of another tensor as base
weight, as sharding and offloading bring one, all is summed: identity alone refreshes nothing. Every forward
pass gets a v of its own, and what the device remembers is written by the check alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import choice
from ..ops.kept_output import version


@dataclass
class DeviceNorm:
    """What the host knows of one v that a device remembers.

    Attributes:
        memory: The device's, see `norm_kernels.Memory`.
        stored: W0 as kernels read it.
        weight, version, address: The base weight that `stored` is a view of.
        scaling: s of the last check.
    """

    memory: Any
    stored: Any
    weight: weakref.ref[Any]
    version: int | None
    address: int
    scaling: float


def check(
    layer: Any, norm: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, weight: Any, seam: Any
) -> Tensor | None:
    """A new v [out] of these factors, s and W0, or None if no kernel can read W0.

    Args:
        norm: The adapter's `state.Norm`, which keeps the device's memory.
        weight: W0 as stored in the layer, or the tensor that stands in for it.
        seam: Gives the `BaseWeight` of `weight`.
    """
    known: DeviceNorm | None = norm.device
    address = weight.data_ptr() if isinstance(weight, Tensor) else 0
    another = known is None or known.weight() is not weight
    due = known is None or known.scaling != scaling or (not another and known.version != version(weight))
    if known is None or another or due or known.address != address:
        matrix = seam()
        kernels, stored = choice.norm_kernels(matrix.device, matrix.dtype), matrix.stored()
        if kernels is None or stored is None:
            return None
        fits = known is not None and known.memory.remembered.device == matrix.device
        memory = known.memory if known is not None and fits else kernels.Memory(matrix.out_features, matrix.device)
        due = due or not fits
        known = DeviceNorm(memory, stored, weakref.ref(weight), version(weight), address, scaling)
    norm.device = known
    kernels = choice.norm_kernels(known.memory.remembered.device, torch.float32)
    A, B = (factor.detach().to(torch.float32) for factor in layer.as_matrices(lora_A, lora_B))
    factors = (lora_A, lora_B)
    return kernels.checked_norm(known.memory, known.stored, A, B, float(scaling), factors, due=due, another=another)


def follow(magnitude: Tensor, tied: Tensor, value: Tensor) -> None:
    """m = v on tied rows, in place and past the version counter, without asking how many there are.

    Args:
        value: v [out], at least 1e-30, which stands for 0.
    """
    flat = magnitude.data.view(-1)
    value = torch.where(value > 1e-30, value, 0).to(flat.dtype)
    flat.copy_(torch.where(tied, value, flat))
