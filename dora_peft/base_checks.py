"""What has to be found out about a base layer before its weight is read: whether all of it is here, and in what dtype
one whose weight cannot be read computes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .offload import is_away

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# By layer: the dtypes of its tensors, and the dtype found for them.
_compute_dtypes: weakref.WeakKeyDictionary[nn.Module, tuple[list[torch.dtype], torch.dtype]] = (
    weakref.WeakKeyDictionary()
)


def compute_dtype(layer: nn.Module, in_features: int) -> torch.dtype:
    """The dtype that a layer whose weight cannot be read computes its product in.

    What it says itself in `compute_dtype` or `dtype`; else by its forward: the most precise dtype that it takes, or the
    one it returns where that is another. Only where no call succeeds, the dtype of its first float tensor: scales are
    often kept in another one than the layer computes in, and some libraries cast them at the first call.
    """
    for name in ("compute_dtype", "dtype"):
        if (said := getattr(layer, name, None)) in FLOATS:
            return said
    dtypes = [t.dtype for t in (*layer.parameters(), *layer.buffers())]
    known = _compute_dtypes.get(layer)
    if known is None or known[0] != dtypes:
        known = _compute_dtypes[layer] = (dtypes, _dtype_by_calling(layer, in_features, dtypes))
    return known[1]


def _dtype_by_calling(layer: nn.Module, in_features: int, dtypes: list[torch.dtype]) -> torch.dtype:
    device = next(t.device for t in (*layer.parameters(), *layer.buffers()))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                # not by `layer(x)`: hooks of others are not to see it
                out = layer.forward(torch.zeros(1, in_features, dtype=dtype, device=device))
        except Exception:  # whatever a library raises for a dtype that it does not take
            continue
        if isinstance(out, Tensor) and out.dtype in FLOATS:
            return out.dtype
    return next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)


def check_creatable(layer: Any, name: str, init_lora_weights: bool | str) -> None:
    """Nothing where an adapter can be created on a base layer whose seam there is.

    Raises:
        ValueError: Only a part of its weight is in this process, or the initialisation would write to one that is
            offloaded.
    """
    tensors = [*getattr(layer, "_parameters", {}).values(), *getattr(layer, "_buffers", {}).values()]
    for tensor in tensors:
        if tensor is None:
            continue
        if hasattr(tensor, "ds_id") and not tensor.numel():
            found = "a placeholder of DeepSpeed ZeRO-3 without elements"
            mend = "Create the adapter before the model is partitioned: load the base without zero.Init, or use ZeRO-2."
        elif hasattr(tensor, "device_mesh"):
            found = f"a sharded one ({type(tensor).__name__} {tuple(tensor.shape)}, {tensor.placements})"
            mend = "Create the adapter before fully_shard or FSDP, and load the base without tp_plan."
        else:
            continue
        raise ValueError(
            f"DoRA cannot adapt module '{name}' ({type(layer).__name__}): expected its whole weight in each process, "
            f"of which the norm per row is taken, found {found}. {mend}"
        )
    if isinstance(init_lora_weights, str) and init_lora_weights not in ("gaussian", "orthogonal") and is_away(layer):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} changes the base weight, and that of module '{name}' is "
            "offloaded: expected it in memory. Load the base model without offloading, or use another initialisation."
        )
