"""Between a model's adapter tensors and a checkpoint that plain PEFT reads to the same outputs.

Three things are translated: a key's spelling, and the two cases in which PEFT divides by zero or uses another norm.

- The magnitude's key is "...lora_magnitude_vector.weight" or, as PEFT writes it, "...lora_magnitude_vector".
- Tied rows (zero rows of W0) are saved with m = v. If v is still 0, PEFT would divide by zero: B gets a small entry
  there (peft_rows.py). The config says which rows these are (norms/ties.py), and loading takes the entries out again.
- Grouped convolutions: PEFT's norm is not that of the composed kernel, so m is multiplied by the ratio of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import norms
from .._row_ranges import Recorded, bare, recorded, to_ranges
from ..bases.offload import at_hand
from ..config import DoraConfig
from ..layers import DoraLayer, layers_of
from ..norms import ties
from ..ops.norm import factored_norm_squared, floor
from . import computed, peft_rows

MAGNITUDE = "lora_magnitude_vector"


def to_checkpoint(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], config: DoraConfig, infix: str | None = None
) -> dict[str, Tensor]:
    """The tensors to save, from those of the model; `config` learns which rows are tied and how the base is quantised.

    Args:
        tensors: One adapter's tensors, named as in the model's state dict.
        config: The adapter's DoraConfig.
        infix: What stands between attribute and "weight" in the names: the adapter's name, which is taken if None, or
            nothing if it has been removed.

    Returns:
        The tensors under the same names, or under PEFT's spelling if the config's magnitude_key asks for it.
    """
    infix = f".{adapter}" if infix is None else infix
    out = dict(tensors)
    tied_rows, filled_rows, complete = {}, {}, True
    for name, layer in layers_of(model, adapter):
        name = name.removeprefix("_fsdp_wrapped_module.")
        prefix = f"{name}." if name else ""
        m_key = f"{prefix}{MAGNITUDE}{infix}.weight"
        computed.to_values(layer, adapter, prefix, infix, out)
        if m_key not in out or out[m_key].is_meta:
            complete = False
            continue
        with at_hand(layer.get_base_layer()):
            changed, tied, filled = _readable_by_peft(layer, adapter, prefix, infix, out)
        out.update(changed)
        if tied is not None:
            tied_rows[bare(name)] = to_ranges(tied)
        if filled is not None and bool(filled.any()):
            filled_rows[bare(name)] = to_ranges(filled)
        if config.magnitude_key == "peft":
            out[m_key.removesuffix(".weight")] = out.pop(m_key)
    config.tied_rows, config.filled_rows = (tied_rows, filled_rows) if complete else (None, None)
    config.base_quantization = _quantisation(model)
    return out


def _quantisation(model: nn.Module) -> dict[str, object] | None:
    """What a model's quantization_config says in texts, numbers and names of modules; None if it has none.

    A base that was quantised otherwise, or not at all, has other norms by up to 2 %.
    """
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    entries: dict[str, object] = found if isinstance(found, dict) else getattr(found, "to_dict", dict)()
    kept = {k: getattr(v, "value", v) for k, v in entries.items()}
    return {k: v for k, v in kept.items() if _is_plain(v) and not k.startswith("_")} or None


def _is_plain(value: object) -> bool:
    """Whether a value is a text, a number, or a list of texts."""
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, (str, int, float))


def _readable_by_peft(
    layer: DoraLayer, adapter: str, prefix: str, infix: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """The tensors of one layer that have to differ from the model's, its tied rows, and those with an entry for PEFT.

    Everything is computed from `tensors`: they may be others than the model's own (an average, a gathered state dict).
    """
    grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
    tied = norms.settle(layer, adapter).tied
    if tied is None and not grouped:
        # Asking for the norm would fail for a sharded model.
        return {}, None, None
    a_key, b_key, m_key = _keys(prefix, infix, tensors)
    lora_A, lora_B, magnitude = tensors[a_key], tensors[b_key], tensors[m_key].detach().clone()
    tied = None if tied is None else tied.to(magnitude.device)
    half = peft_rows.in_half(layer, lora_A, lora_B, magnitude)
    if grouped:
        c = magnitude.flatten() / _grouped_norm(layer, adapter, lora_A, lora_B).to(magnitude)
        norm = _peft_grouped_norm(layer, adapter, lora_A, lora_B)
        c = c if tied is None else torch.where(tied, torch.ones_like(c), c)
    elif tied is not None:
        norm = _norms_of(layer, adapter, (lora_A, lora_B), tied)
    changed, filled = {}, None
    if tied is not None and bool((empty := tied & (norm.to(tied.device) <= peft_rows.limit(half))).any()):
        fill = peft_rows.fill_grouped if grouped else peft_rows.fill
        new_A, new_B, filled = fill(layer, adapter, lora_A, lora_B, empty, half)
        changed = {a_key: new_A, b_key: new_B}
        norm = (
            _peft_grouped_norm(layer, adapter, new_A, new_B)
            if grouped
            else _norms_of(layer, adapter, (new_A, new_B), tied)
        )
    if grouped:
        changed[m_key] = (c.to(norm) * norm).to(magnitude).view(magnitude.shape)
    elif tied is not None:
        magnitude.view(-1)[tied] = norm.to(magnitude)[tied]
        changed[m_key] = magnitude
    return changed, tied, filled


def _keys(prefix: str, infix: str, tensors: dict[str, Tensor]) -> tuple[str, str, str]:
    """The names of a layer's A, B and m; those of an embedding are parameters, without ".weight"."""
    a_key, b_key = f"{prefix}lora_A{infix}.weight", f"{prefix}lora_B{infix}.weight"
    if a_key not in tensors:
        a_key, b_key = f"{prefix}lora_embedding_A{infix}", f"{prefix}lora_embedding_B{infix}"
    return a_key, b_key, f"{prefix}{MAGNITUDE}{infix}.weight"


def _norms_of(layer: DoraLayer, adapter: str, factors: tuple[Tensor, Tensor], tied: Tensor) -> Tensor:
    """v [out] for tied rows and these factors; other rows hold anything."""
    zero = ties.zero_rows(layer)
    # The tied rows of a sharded weight are zero.
    zero = tied if zero is None else zero.to(tied.device)
    norm = torch.zeros(tied.shape, device=tied.device, dtype=layer.base_weight().dtype)
    norm[tied & zero] = ties.change_norm(layer, adapter, factors, tied & zero).to(norm)
    # The adapter was trained on another base, where these rows were zero.
    other = tied & ~zero
    if bool(other.any()):
        norm[other] = norms.up_to_date(layer, adapter).value.to(norm)[other]
    return norm


def from_checkpoint(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], config: DoraConfig
) -> dict[str, Tensor]:
    """The tensors to load, named without the adapter, from a checkpoint of ours or of PEFT's `use_dora`.

    Which rows are tied is settled here: by what the folder's config says, or else by the tensors.

    Args:
        model: The model that they will be loaded into.
        adapter: The adapter's name in it.
        tensors: As read from the file.
        config: The DoraConfig that belongs to them.

    Returns:
        The tensors, all names spelled with ".weight".

    Raises:
        ValueError: A magnitude or factor is missing, not floating point, or not finite, or the config names rows that
            a layer does not have; nothing has been loaded then.
    """
    out = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: v for k, v in tensors.items()}
    layers = layers_of(model, adapter)
    computed.check_loadable(layers, adapter)
    problems = _problems_of_tensors(out)
    rows = _recorded_rows(layers, config, problems)
    for name, _ in layers:
        prefix = name.removeprefix("_fsdp_wrapped_module.")
        found = [p for p in (prefix, f"base_model.model.{prefix}") if any(k.startswith(f"{p}.lora_") for k in out)]
        # PEFT reports the keys of a module that the checkpoint says nothing about.
        if found and f"{found[0]}.{MAGNITUDE}.weight" not in out:
            problems.setdefault("have factors but no magnitude (a plain LoRA adapter?)", []).append(prefix)
    if problems:
        listed = "; ".join(f"{', '.join(k[:3])}{' ...' * (len(k) > 3)} {what}" for what, k in problems.items())
        raise ValueError(
            f"Cannot load DoRA adapter '{adapter}': expected finite floating point lora_A, lora_B and "
            f"lora_magnitude_vector for every adapted module, found: {listed}. Nothing was loaded. Use an intact DoRA "
            "checkpoint, or load a plain LoRA adapter with peft.LoraConfig."
        )
    for name, layer in layers:
        keys = keys_of(f"{name}.", out)
        _keep_dtypes(layer, adapter, keys, out)
        _bring_in(layer, adapter, tuple(out.get(key) for key in keys))
        # A layer that nothing is loaded into stays as it is, with the rows that are tied now.
        if _fits(layer, adapter, tuple(out.get(key) for key in keys)):
            with at_hand(layer.get_base_layer()):
                _load_layer(layer, adapter, keys, out, *rows[name])
    return out


def _problems_of_tensors(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    """What is wrong with an adapter's tensors, and the keys of those concerned."""
    problems: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        if "lora_" not in key:
            continue
        if not tensor.is_floating_point():
            problems.setdefault(f"have dtype {tensor.dtype} instead of a floating point one", []).append(key)
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            problems.setdefault("hold NaN or infinite values", []).append(key)
    return problems


def _recorded_rows(
    layers: list[tuple[str, DoraLayer]], config: DoraConfig, problems: dict[str, list[str]]
) -> dict[str, tuple[Recorded, Recorded]]:
    """By layer, what the config says about its tied and its filled rows; records that do not fit go to `problems`."""
    modules = {bare(name) for name, _ in layers}
    rows = {}
    for name, layer in layers:
        try:
            tied = recorded(config.tied_rows, bare(name), layer.out_features, modules)
            rows[name] = tied, recorded(config.filled_rows, bare(name), layer.out_features, modules)
        except ValueError as error:
            problems.setdefault(f"have other rows than the config's tied_rows, {error}", []).append(name)
    return rows


def keys_of(prefix: str, tensors: dict[str, Tensor]) -> tuple[str, str, str]:
    """The names of a layer's A, B and m in a checkpoint, which may have PeftModel's prefix or not."""
    found = _keys(prefix, "", tensors)
    return found if found[0] in tensors else _keys(f"base_model.model.{prefix}", "", tensors)


def _keep_dtypes(layer: DoraLayer, adapter: str, keys: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    """With low_cpu_mem_usage the tensors of the file become the parameters: in the dtype that these were made in."""
    own = (*layer.factor_parameters(adapter), layer.magnitude(adapter))
    for key, parameter in zip(keys, own, strict=True):
        if parameter.is_meta and key in tensors:
            tensors[key] = tensors[key].to(parameter.dtype)


def _bring_in(layer: DoraLayer, adapter: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Give parameters that PEFT left on the meta device a place, as its own loading would write into nothing.

    Over a base weight that is offloaded to disk PEFT leaves them to accelerate.
    """
    holders: list[tuple[dict[str, nn.Parameter | None], str]] = []
    for names in (("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B"), (MAGNITUDE,)):
        held = next(m for name in names if adapter in (m := getattr(layer, name)))
        own = held[adapter]
        holders.append((held._parameters, adapter) if isinstance(own, nn.Parameter) else (own._parameters, "weight"))
    for (parameters, name), tensor in zip(holders, tensors, strict=True):
        old = parameters[name]
        if old is not None and old.is_meta and tensor is not None and not tensor.is_meta and tensor.shape == old.shape:
            empty = torch.empty(old.shape, dtype=old.dtype, device=tensor.device)
            parameters[name] = nn.Parameter(empty, requires_grad=old.requires_grad)


def _fits(layer: DoraLayer, adapter: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether PEFT will load A, B and m; it refuses or skips those of another shape."""
    own = (*layer.factor_parameters(adapter), layer.magnitude(adapter))
    return all(t is not None and not t.is_meta and t.shape == o.shape for t, o in zip(tensors, own, strict=True))


def _load_layer(
    layer: DoraLayer,
    adapter: str,
    keys: tuple[str, str, str],
    tensors: dict[str, Tensor],
    tied: Recorded,
    filled: Recorded,
) -> None:
    """Undo in `tensors` what was done for plain PEFT, and settle which rows are tied."""
    a_key, b_key, m_key = keys
    in_file = tensors[a_key], tensors[b_key]
    factors = in_file
    if layer.magnitude_only.get(adapter):
        factors = torch.zeros_like(in_file[0]), torch.zeros_like(in_file[1])
    elif not isinstance(filled, bool):
        factors = peft_rows.take_out(*in_file, filled)
    tensors[a_key], tensors[b_key] = factors
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        if layer.original_weight().is_meta:
            raise ValueError(
                f"Cannot load the magnitudes of the grouped convolution '{layer.name}': converting them from PEFT's "
                "norm needs its weight, which is on the meta device. Load the base model with its convolutions in "
                "memory, not on disk, or load the base weights before the adapter."
            )
        # PEFT's magnitude, for the factors in the file, to that of the composed kernel
        magnitude = tensors[m_key]
        theirs = _peft_grouped_norm(layer, adapter, *in_file)
        ratio = _grouped_norm(layer, adapter, *factors) / theirs.clamp(min=1e-30)
        tensors[m_key] = magnitude * ratio.to(magnitude).view(magnitude.shape)
    ties.settle_loaded(layer, adapter, tied, factors, tensors[m_key])


@torch.no_grad()
def _grouped_norm(layer: DoraLayer, adapter: str, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    weight, base = layer.base_weight(), norms.base_squared(layer)
    matrix_A, matrix_B = layer.as_matrices(lora_A, lora_B)
    squared = factored_norm_squared(weight, base, matrix_A.to(base), matrix_B.to(base), layer.initial_scaling(adapter))
    return torch.maximum(squared.clamp_(min=0).sqrt_(), floor(base))


@torch.no_grad()
def _peft_grouped_norm(layer: DoraLayer, adapter: str, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The norm that PEFT 0.20 to 0.21.2 divides by: B [out, r / groups] and A [r, in] reshaped to matrices whose
    product has the kernel's number of elements, though not its meaning."""
    kernel = layer.original_weight()
    assert isinstance(kernel, Tensor)
    norm_dtype = norms.base_squared(layer).dtype
    r = lora_A.shape[0]
    change = lora_B.detach().to(kernel.device, norm_dtype).reshape(-1, r) @ lora_A.detach().to(
        kernel.device, norm_dtype
    ).reshape(r, -1)
    composed = kernel.detach().to(norm_dtype) + layer.initial_scaling(adapter) * change.reshape(kernel.shape)
    return composed.flatten(1).norm(dim=1)
