"""c * (z - b) + s u B^T + b: what turns the base layer's output into the adapted one, by torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import chunk


def fold(lora_B: Tensor, c: Tensor, scaling: float) -> Tensor:
    """s c * B [out, r], in c's dtype or wider."""
    return lora_B * (c if scaling == 1.0 else scaling * c)[:, None]


def scaled_sum(
    z: Tensor, u: Tensor, folded_B: Tensor, c: Tensor, bias: Tensor | None, *, out: Tensor, alpha: float = 1.0
) -> Tensor:
    """out = c * (z - b) + alpha u folded_B^T + b for z = x W0^T + b [N, out] and u [N, r]; `out` may be z.

    If z is narrower than c, the sum is made in c's dtype and rounded once. If c = 1 and B = 0, `out` equals z bit for
    bit: an adapter that changes nothing yet gives the base layer's output.
    """
    # (1 - c) b; with a number in it, an operation on [out] takes three times as long
    offset = None if bias is None else torch.addcmul(bias, c, bias, value=-1)
    if z.dtype is c.dtype or z.device.type != "cpu":
        # a GPU's element-wise kernels convert in registers, and its products accumulate in fp32
        if offset is None:
            torch.mul(z, c, out=out)
        else:
            torch.addcmul(offset, z, c, out=out)
        folded_B = folded_B if folded_B.dtype is out.dtype else folded_B.to(out.dtype)
        return out.addmm_(u, folded_B.T, alpha=alpha)
    step = chunk(len(z), z.device) if len(z) else 1
    for start in range(0, len(z), step):
        part = slice(start, start + step)
        wide = z[part].to(c.dtype)
        if offset is None:
            wide.mul_(c)
        else:
            torch.addcmul(offset, wide, c, out=wide)
        out[part] = wide.addmm_(u[part].to(c.dtype), folded_B.T.to(c.dtype), alpha=alpha)
    return out
