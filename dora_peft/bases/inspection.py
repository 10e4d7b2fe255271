"""What has to be found out about a base layer itself: what its weight is made from, whether all of it is here, and how
to call a layer whose weight cannot be read: in what dtype, and without its bias."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .offload import is_away

# What libraries raise for a call that a layer does not take: each its own, but none of them Ctrl-C or an interpreter's.
# Running out of memory is a RuntimeError of torch's, and has to be raised again before.
NOT_TAKEN = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# By layer: the dtypes of its tensors, and the dtype found for them.
_compute_dtypes: weakref.WeakKeyDictionary[nn.Module, tuple[list[torch.dtype], torch.dtype]] = (
    weakref.WeakKeyDictionary()
)
# Whether a layer that is called without its bias computes a linear map.
_separable: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
# The hooks of all modules at once, which `torch.nn.modules.module.register_module_forward_hook` and its like fill.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_global_hooks() -> bool:
    """Whether somebody watches the calls of all modules, so that none may be left out."""
    return any(GLOBAL_HOOKS)


def parts(layer: nn.Module) -> list[Tensor] | None:
    """The tensors that a quantised base weight is made from besides `DoraLayer.original_weight`.

    Scales and zero points, which a library may round to another dtype at the first call, or bitsandbytes' statistics,
    which an evaluation rounds.

    Returns:
        None for torch's own layers, which never have any.
    """
    if type(layer) in _PLAIN:
        return None
    tensors = layer._parameters
    weight = tensors.get("weight")
    if weight is not None:
        state = getattr(weight, "quant_state", None)
        # a weight that is packed for evaluation has other content than the unpacked one already
        return [] if state is None or getattr(state, "packing_format_for_cpu", False) else [state.absmax]
    held = (*tensors.items(), *layer._buffers.items())
    return [tensor for name, tensor in held if tensor is not None and name not in ("bias", "qweight", "W_q")]


def linear_map(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor | None]:
    """A module that computes W0 x, and the bias that it adds all the same.

    In low precision an output with b has lost what b drowns, and subtracting b does not bring it back: if that is
    possible the module is a twin of the layer without b.

    Args:
        layer: A linear base layer.
        x: [N, in], N > 0, such as it will be called with.

    Returns:
        The module, and b [out] if its output includes b, else None.
    """
    twin = _without_bias(layer)
    if twin is not None and layer not in _separable:
        try:
            with torch.no_grad():
                _separable[layer] = not bool(twin(torch.zeros_like(x[:1])).any())
        except torch.OutOfMemoryError:
            raise
        # the layer cannot do without its bias
        except NOT_TAKEN:
            _separable[layer] = False
    if twin is not None and _separable[layer]:
        return twin, None
    return layer, getattr(layer, "bias", None)


def _without_bias(layer: nn.Module) -> nn.Module | None:
    """A shallow twin of a base layer without its bias.

    What its forward sets, such as scales in the dtype of x, it sets in the twin: the layer is left as it is.

    Returns:
        None if the twin could differ from the layer: hooks, a forward of this very object, or a bias that is
        neither a parameter nor a buffer.
    """
    if "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks or has_global_hooks():
        return None
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    # Module.compile() binds it to the layer
    twin.__dict__.pop("_compiled_call_impl", None)
    for kind in ("_parameters", "_buffers"):
        held = layer.__dict__[kind].items()
        twin.__dict__[kind] = {name: None if name == "bias" else tensor for name, tensor in held}
    return twin if getattr(twin, "bias", None) is None else None


def compute_dtype(layer: nn.Module, in_features: int) -> torch.dtype:
    """The dtype that a layer whose weight cannot be read computes its product in.

    What it says itself in `compute_dtype` or `dtype`; else by its forward: the most precise dtype that it takes, or the
    one it returns if that is another. Only if no call succeeds, the dtype of its first float tensor: scales are
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
                out = (_without_bias(layer) or layer).forward(torch.zeros(1, in_features, dtype=dtype, device=device))
        except torch.OutOfMemoryError:
            raise
        # another dtype is tried
        except NOT_TAKEN:
            continue
        if isinstance(out, Tensor) and out.dtype in FLOATS:
            return out.dtype
    return next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)


def check_creatable(layer: nn.Module, name: str, init_lora_weights: bool | str) -> None:
    """Refuse a base layer on which no adapter can be created, although it has a seam.

    Args:
        layer: The base layer.
        name: Its module name, for errors.
        init_lora_weights: The config's.

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


def stored_weight(base: nn.Module) -> Tensor | nn.Module:
    """The weight of a base layer as stored: a tensor, or the layer itself if it keeps its weight in parts."""
    for name in ("weight", "qweight", "W_q"):
        stored = base._parameters.get(name)
        if stored is None:
            # computed at each call, or a buffer
            stored = getattr(base, name, None)
        if isinstance(stored, Tensor):
            return stored
    return base
