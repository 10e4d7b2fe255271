"""Between a model's adapter tensors and a checkpoint that plain PEFT reads to the same outputs.

Three things differ between the two, all of them in cases where PEFT's `use_dora` is undefined or its norm is another
one:

- the magnitude's key: "...lora_magnitude_vector.weight" or, as PEFT writes it, "...lora_magnitude_vector";
- tied rows (zero rows of W0): saved with m = v, and where v is still 0 with a tiny entry in B, so that PEFT divides by
  something;
- grouped convolutions: PEFT's norm is not that of the composed kernel, so m is rescaled by the ratio of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional, norms

MAGNITUDE = "lora_magnitude_vector"
# The norm of a row that is 0 in W0 and in the adapter. Its square must not underflow in fp32.
TINY = 1e-12


def _layers(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if adapter in getattr(m, MAGNITUDE, {}) and hasattr(m, "_norms")]


def to_checkpoint(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], key: str, infix: str | None = None
) -> dict[str, Tensor]:
    """The tensors to save, from those of the model.

    Args:
        tensors: One adapter's tensors, named as in the model's state dict.
        key: "weight" or "peft", DoraConfig.magnitude_key.
        infix: What stands between attribute and "weight" in the names: the adapter's name, or nothing where it has been
            removed.
    """
    infix = f".{adapter}" if infix is None else infix
    out = dict(tensors)
    for name, layer in _layers(model, adapter):
        name = name.removeprefix("_fsdp_wrapped_module.")
        prefix = f"{name}." if name else ""
        m_key = f"{prefix}{MAGNITUDE}{infix}.weight"
        if m_key not in out:
            continue
        magnitude = out[m_key]
        if not magnitude.is_meta:
            out.update(_readable_by_peft(layer, adapter, prefix, infix, out))
        if key == "peft":
            out[m_key.removesuffix(".weight")] = out.pop(m_key)
    return out


def _readable_by_peft(
    layer: Any, adapter: str, prefix: str, infix: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one layer that have to differ from the model's."""
    grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
    known = layer._norms.get(adapter)
    if known is not None and known.settled and known.tied is None and not grouped:
        return {}  # also keeps a sharded model, whose state dict was gathered, from being asked for its norm
    m_key = f"{prefix}{MAGNITUDE}{infix}.weight"
    norm: Any = norms.weight_norm(layer, adapter)
    changed = {}
    magnitude = tensors[m_key].detach().clone()
    if norm.tied is not None:
        flat, value = magnitude.view(-1), norm.value.to(magnitude)
        tied = norm.tied.to(magnitude.device)
        flat[tied] = value[tied]
        empty = tied & (value <= TINY)
        if bool(empty.any()):
            flat[empty] = TINY
            changed.update(_fill_empty_rows(layer, adapter, prefix, infix, tensors, empty))
        changed[m_key] = magnitude
    if grouped:
        ratio = _peft_grouped_norm(layer, adapter) / norm.value
        changed[m_key] = magnitude * ratio.to(magnitude).view(magnitude.shape)
    return changed


def _fill_empty_rows(
    layer: Any, adapter: str, prefix: str, infix: str, tensors: dict[str, Tensor], empty: Tensor
) -> dict[str, Tensor]:
    """B with an entry in each empty row that makes ||s B A|| = TINY there (and A, should it be all zero)."""
    a_key, b_key = f"{prefix}lora_A{infix}.weight", f"{prefix}lora_B{infix}.weight"
    if a_key not in tensors:  # parameters of an embedding, without ".weight"
        a_key, b_key = f"{prefix}lora_embedding_A{infix}", f"{prefix}lora_embedding_B{infix}"
    lora_A, lora_B = tensors[a_key].detach().clone(), tensors[b_key].detach().clone()
    scaling = abs(float(layer.scaling[adapter])) or 1.0
    row = lora_A.flatten(1).norm(dim=1).argmax()
    length = lora_A[row].norm().item()
    if length == 0:
        lora_A[row].view(-1)[0] = length = TINY
        lora_B[empty] = 0
    lora_B[empty, row] = TINY / (scaling * length)
    return {a_key: lora_A, b_key: lora_B}


def from_checkpoint(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to load, named without the adapter, from a checkpoint of ours or of PEFT's `use_dora`.

    Raises:
        ValueError: A magnitude or factor is missing, not floating point, or not finite; nothing has been loaded then.
    """
    out = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: v for k, v in tensors.items()}
    problems: dict[str, list[str]] = {}
    for key, tensor in out.items():
        if "lora_" not in key:
            continue
        if not tensor.is_floating_point():
            problems.setdefault(f"have dtype {tensor.dtype} instead of a floating point one", []).append(key)
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            problems.setdefault("hold NaN or infinite values", []).append(key)
    for name, _ in _layers(model, adapter):
        name = name.removeprefix("_fsdp_wrapped_module.")
        prefix = next(
            (p for p in (name, f"base_model.model.{name}") if any(k.startswith(f"{p}.lora_") for k in out)), None
        )
        if prefix is None:
            continue  # the checkpoint says nothing about this module; PEFT reports missing keys
        if f"{prefix}.{MAGNITUDE}.weight" not in out:
            problems.setdefault("have factors but no magnitude (a plain LoRA adapter?)", []).append(name)
    if problems:
        found = "; ".join(
            f"{', '.join(where[:3])}{' ...' * (len(where) > 3)} {what}" for what, where in problems.items()
        )
        raise ValueError(
            f"Cannot load DoRA adapter '{adapter}': expected finite floating point lora_A, lora_B and "
            f"lora_magnitude_vector for every adapted module, found: {found}. Nothing was loaded. Use an intact DoRA "
            "checkpoint, or load a plain LoRA adapter with peft.LoraConfig."
        )
    for name, layer in _layers(model, adapter):
        layer._norms[adapter] = norms.Norm()  # tied rows are read off the loaded tensors at the next use
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            for prefix in (f"{name}.", f"base_model.model.{name}."):
                if f"{prefix}{MAGNITUDE}.weight" in out:
                    _undo_grouped(layer, adapter, prefix, out)
    return out


def _undo_grouped(layer: Any, adapter: str, prefix: str, tensors: dict[str, Tensor]) -> None:
    """PEFT's magnitude of a grouped convolution to that of the composed kernel, for the factors being loaded."""
    factors = (tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"])
    magnitude = tensors[f"{prefix}{MAGNITUDE}.weight"]
    true_norm = _grouped_norm(layer, adapter, *factors)
    ratio = true_norm / _peft_grouped_norm(layer, adapter, *factors)
    tensors[f"{prefix}{MAGNITUDE}.weight"] = magnitude * ratio.to(magnitude).view(magnitude.shape)


@torch.no_grad()
def _grouped_norm(layer: Any, adapter: str, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    weight, base = layer.base_weight(), norms.base_squared(layer)
    matrix_A, matrix_B = layer.as_matrices(lora_A, lora_B)
    squared = functional.norm_squared(weight, base, matrix_A.to(base), matrix_B.to(base), float(layer.scaling[adapter]))
    return squared.clamp_(min=0).sqrt_()


@torch.no_grad()
def _peft_grouped_norm(layer: Any, adapter: str, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> Tensor:
    """The norm that PEFT 0.20 to 0.21.2 divides by: B [out, r / groups] and A [r, in] reshaped to matrices whose
    product has the kernel's number of elements, though not its meaning."""
    if lora_A is None or lora_B is None:
        lora_A, lora_B = layer.factor_parameters(adapter)
    kernel = layer.original_weight()
    norm_dtype = norms.base_squared(layer).dtype
    r = lora_A.shape[0]
    change = lora_B.detach().to(kernel.device, norm_dtype).reshape(-1, r) @ lora_A.detach().to(
        kernel.device, norm_dtype
    ).reshape(r, -1)
    composed = kernel.detach().to(norm_dtype) + float(layer.scaling[adapter]) * change.reshape(kernel.shape)
    return composed.flatten(1).norm(dim=1)
