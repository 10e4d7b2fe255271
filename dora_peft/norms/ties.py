"""Tied rows: which rows of a layer have a magnitude that follows their norm (c = 1), and how that travels.

A row whose norm is 0 at creation, a zero row of W0, is tied: it trains as plain LoRA instead of dividing by 0. Which
rows are tied is a fact of the adapter, not of its values: after some steps nothing in A, B and m shows it reliably.
So a folder says it, in its own entries of adapter_config.json, by module of the base model as ranges of rows:

    tied_rows     c = 1 there
    filled_rows   of these, the rows whose v was still 0 and B got an entry for plain PEFT alone; loading takes it out

Both are `{"model.layers.0.self_attn.o_proj": [[17, 19], [40, 41]], ...}` with only the modules that have such rows, and
present although empty: a folder without them was written by PEFT or by an earlier version. There the loaded values
are asked, before anything else can change them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases import BaseWeight, Dense
from . import lifecycle, state
from .adapted import AdaptedLayer


def rows_to_keep_zero(weight: BaseWeight, init_lora_weights: bool | str) -> Tensor | None:
    """The zero rows of W0, bool [out], if the initialisation would blur them; None if there are none.

    PiSSA and OLoRA move s B A out of W0 and leave rounding noise in a zero row of both; an orthogonal B is not zero.
    v is not exactly 0 then, though W0 + s B A is meant to be W0.
    """
    blurs = isinstance(init_lora_weights, str) and init_lora_weights != "gaussian"
    if not blurs or type(weight) is not Dense or weight.device.type == "meta":
        return None
    zero = weight.row_norms_squared() == 0
    return zero if bool(zero.any()) else None


@torch.no_grad()
def keep_zero(weight: Tensor, lora_B: Tensor, rows: Tensor) -> None:
    """Clear these rows of W0 [out, in] and of B again, in place."""
    weight.data[rows.to(weight.device)] = 0
    lora_B.data[rows.to(lora_B.device)] = 0


def guess(magnitude: Tensor, value: Tensor, stored: set[torch.dtype]) -> Tensor:
    """Which of the zero rows of W0 were tied when they were saved, bool [k]: those whose magnitude is their norm.

    Args:
        magnitude, value: m and v of zero rows, [k].
        stored: The dtypes of the saved m, A and B.
    """
    # a file in fp32 may hold what had been rounded to another dtype
    rounded = {d for d in (torch.bfloat16, torch.float16) if torch.equal(magnitude, magnitude.to(d).to(magnitude))}
    infos = [torch.finfo(dtype) for dtype in stored | rounded]
    # m and v are products of a few numbers rounded to that dtype; below its normal numbers nothing is certain, and
    # m of a grouped convolution comes from a floored v
    rtol, atol = max(1e-4, *(4 * i.eps for i in infos)), max(1e-29, *(i.smallest_normal for i in infos))
    return torch.isclose(magnitude.to(value), value, rtol=rtol, atol=atol)


@torch.no_grad()
def settle_loaded(
    layer: AdaptedLayer, adapter: str, tied: Tensor | bool | None, factors: tuple[Tensor, Tensor], magnitude: Tensor
) -> None:
    """Tie the rows of an adapter that is being loaded, before anyone can change its tensors.

    Args:
        layer: The adapted layer.
        tied: What the folder's record says, see `recorded`. False: found from the values.
        factors: (A, B) to be loaded, as the layer stores them.
        magnitude: m to be loaded.
    """
    if isinstance(tied, bool):
        zero = zero_rows(layer)
        if zero is None:
            # W0 is still to come: read off the tensors at the next use
            lifecycle.unsettle(layer, adapter)
            return
        tied = _of_zero_rows(layer, adapter, zero, factors, magnitude) if bool(zero.any()) else None
    lifecycle.settle_as(layer, adapter, tied)


def settle_late(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """The tied rows of an adapter that was loaded while W0 was not here, from its tensors as they are now.

    Raises:
        RuntimeError: W0 is still not here.
    """
    settle_loaded(layer, adapter, False, layer.factor_parameters(adapter), layer.magnitude(adapter))
    norm = layer._norms[adapter]
    if not norm.settled:
        raise RuntimeError(f"The base weight of module '{layer.name}' is on the meta device or sharded; load it first.")
    return norm.tied


def zero_rows(layer: AdaptedLayer) -> Tensor | None:
    """Which rows of W0 are zero, bool [out]; None if W0 is not here (on the meta device, sharded)."""
    weight = layer.base_weight()
    if weight.device.type == "meta" or hasattr(layer.original_weight(), "device_mesh"):
        return None
    return state.base_squared(layer) == 0


def _of_zero_rows(
    layer: AdaptedLayer, adapter: str, zero: Tensor, factors: tuple[Tensor, Tensor], magnitude: Tensor
) -> Tensor | None:
    m = magnitude.detach().flatten().to(zero.device)
    if layer.magnitude_only.get(adapter):
        # m is never trained apart from v there; the factors in the file are for plain PEFT
        tied = zero
    else:
        stored = {tensor.dtype for tensor in (magnitude, *factors)}
        tied = zero.clone()
        tied[zero] = guess(m[zero], change_norm(layer, adapter, factors, zero), stored)
    return tied if bool(tied.any()) else None


@torch.no_grad()
def change_norm(layer: AdaptedLayer, adapter: str, factors: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """||s B A|| of some rows, [k], in fp32 (fp64 for an fp64 base). `rows` is bool [out]."""
    dtype = layer.base_weight().dtype
    lora_A, lora_B = (factor.detach().to(rows.device, dtype) for factor in layer.as_matrices(*factors))
    product = lora_B[rows] @ lora_A
    # 1e-12 squared is near the end of fp32 for a wide row
    largest = product.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
    norm = torch.linalg.vector_norm(product / largest, dim=1) * largest[:, 0]
    return norm * abs(layer.initial_scaling(adapter))
