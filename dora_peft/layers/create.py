"""Making an adapter on a layer: PEFT's initial factors, and m = ||W0 + s B A||."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from peft import LoftQConfig
from peft.tuners import lora
from torch import Tensor, nn

from .. import norms
from ..bases import BaseWeight, offload
from ..bases.inspection import FLOATS, check_creatable
from ..config import DoraConfig
from ..norms import ties
from ..ops.merging import is_finite
from .kind import ComputingLayer
from .magnitude import Magnitude


class NewLayer(ComputingLayer, Protocol):
    """What making an adapter writes to, see `DoraLayer`."""

    peft_layer: type
    adapter_layer_names: tuple[str, ...]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    detach_norm: dict[str, bool]
    dropout_mode: dict[str, str]
    magnitude_only: dict[str, bool]
    lora_dropout: nn.ModuleDict
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict
    fan_in_fan_out: bool
    merged_adapters: list[str]

    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]: ...
    def magnitude(self, adapter: str) -> nn.Parameter: ...


def create(layer: NewLayer, adapter: str, r: int, lora_alpha: float, config: DoraConfig, magnitude_only: bool) -> None:
    """See `DoraLayer.update_layer`."""
    base = layer.get_base_layer()
    check_creatable(base, layer.name, config.init_lora_weights)
    _check_rank(layer.name, r, layer.base_weight())
    with offload.at_hand(base):
        weight = layer.base_weight()
        zero = ties.rows_to_keep_zero(weight, config.init_lora_weights)
        if _decomposes(config) and not magnitude_only:
            _check_finite(layer, config, r, lora_alpha, {"W0": layer.original_weight()}, "before")
        initialised = _peft_factors(layer, adapter, r, lora_alpha, config, magnitude_only)
        layer.r[adapter] = r
        layer.lora_alpha[adapter] = lora_alpha
        layer.scaling[adapter] = initialised.scaling[adapter]
        layer.use_rslora[adapter] = config.use_rslora
        layer.detach_norm[adapter] = config.detach_norm
        layer.dropout_mode[adapter] = config.dropout_mode
        layer.magnitude_only[adapter] = magnitude_only
        # an adapter added to a model in evaluation must not drop
        layer.lora_dropout[adapter] = initialised.lora_dropout[adapter].train(layer.training)
        for names in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            created = getattr(initialised, names)
            if adapter in created:
                getattr(layer, names)[adapter] = created[adapter]
        factors = layer.factor_parameters(adapter)
        _finish_factors(layer, factors, magnitude_only, zero)
        shape = layer.kind.magnitude_shape(base, weight.out_features)
        if weight.device.type == "meta" or any(factor.is_meta for factor in factors):
            value = torch.empty(shape, dtype=weight.dtype, device="meta")
            norms.drop(layer, adapter)
        else:
            value = norms.initial(layer, adapter).reshape(shape).clone()
            found = {"A": factors[0], "B": factors[1], "the norm of W0 + s B A": value}
            _check_finite(layer, config, r, lora_alpha, found, "after")
        layer.lora_magnitude_vector[adapter] = Magnitude(value)
    for module in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        if adapter in module:
            offload.keep_resident(module[adapter])
    offload.keep_resident(layer.lora_embedding_A)
    offload.keep_resident(layer.lora_embedding_B)


def reset(layer: NewLayer, adapter: str, init_lora_weights: bool | str) -> None:
    """Initialise an adapter anew, in place: A and B as PEFT does, m = ||W0 + s B A||. False changes nothing, as there.

    Raises:
        ValueError: The initialisation would change the base weight, the adapter is merged, or its tensors are computed.
    """
    base, factors = layer.get_base_layer(), layer.factor_parameters(adapter)
    magnitude = layer.magnitude(adapter)
    if init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights must be True, False, 'gaussian' or 'orthogonal' to reset an adapter, found "
            f"{init_lora_weights!r}. Others change the base weight: create another adapter."
        )
    if any(not isinstance(tensor, nn.Parameter) for tensor in (*factors, magnitude)):
        raise ValueError(
            f"Cannot reset adapter '{adapter}' of module '{layer.name}': its tensors are computed from others (prune, "
            "parametrize). Remove the masks or parametrizations first."
        )
    if layer.merged_adapters:
        raise ValueError(
            f"Cannot reset adapter '{adapter}' of module '{layer.name}' while it is merged. Unmerge first."
        )
    if init_lora_weights is False:
        return
    config = DoraConfig(init_lora_weights=init_lora_weights)
    with offload.at_hand(base), torch.no_grad():
        initialised = _peft_factors(
            layer, adapter, layer.r[adapter], layer.lora_alpha[adapter], config, layer.magnitude_only[adapter]
        )
        for name, factor in zip("AB", factors, strict=True):
            made = getattr(initialised, f"lora_{name}" if layer.kind.calls else f"lora_embedding_{name}")[adapter]
            factor.copy_(made.weight if layer.kind.calls else made)
        zero = ties.rows_to_keep_zero(layer.base_weight(), init_lora_weights)
        _finish_factors(layer, factors, layer.magnitude_only[adapter], zero)
        magnitude.copy_(norms.initial(layer, adapter).reshape(magnitude.shape))


def _finish_factors(
    layer: NewLayer, factors: tuple[nn.Parameter, nn.Parameter], magnitude_only: bool, zero: Tensor | None
) -> None:
    """Give PEFT's factors the base's dtype if they are on the meta device, and zeros where they have to stay zero."""
    stored = layer.original_weight()
    # PEFT gives real factors the dtype of a floating point base, from which autocasting starts
    if isinstance(stored, Tensor) and stored.is_floating_point():
        for factor in factors:
            if factor.is_meta:
                factor.data = factor.data.to(stored.dtype)
    if magnitude_only:
        with torch.no_grad():
            for factor in factors:
                factor.zero_()
    if zero is not None and isinstance(stored, Tensor):
        ties.keep_zero(layer.kind.matrix(layer.get_base_layer(), stored), factors[1], zero)


def _check_rank(name: str, r: int, weight: BaseWeight) -> None:
    # Beyond the longer side a rank is surely a mistake; up to there it only wastes parameters (a router of 8
    # outputs among all linear layers). The usual small ranks have to work on every layer, however narrow.
    largest = max(weight.out_features, weight.in_features, 16)
    if not isinstance(r, int) or r <= 0:
        raise ValueError(
            f"`r` should be a positive integer value but the value passed is {r} (module '{name}'). "
            "Change r or its entry in rank_pattern."
        )
    if r > largest:
        raise ValueError(
            f"Rank r={r} is larger than module '{name}' itself, whose weight is "
            f"{weight.out_features} x {weight.in_features}. Choose r <= "
            f"{min(weight.out_features, weight.in_features)}, for this module alone with "
            f"rank_pattern={{'{name}': ...}}."
        )


def _decomposes(config: DoraConfig) -> bool:
    """Whether the initialisation takes something apart that has to be finite for it, and may write to W0."""
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal")


def _check_finite(
    layer: NewLayer, config: DoraConfig, r: int, lora_alpha: float, tensors: Mapping[str, norms.Stored], when: str
) -> None:
    """Refuse NaN and infinity: v would be NaN, and m with it. Whoever creates the adapter restores the base weight."""

    def broken(tensor: norms.Stored) -> bool:
        # a quantised one shows in the norm, if at all
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
        plain = cast(Tensor, tensor)
        return plain.dtype in FLOATS and not plain.is_meta and not is_finite(plain.detach())

    found = [name for name, tensor in tensors.items() if broken(tensor)]
    if not found:
        return
    init = f"init_lora_weights={config.init_lora_weights!r}"
    if "W0" in found or (not _decomposes(config) and broken(layer.original_weight())):
        found, when = ["W0"], "before"
        mend = "Load an intact base model, or leave the module out with exclude_modules."
    elif lora_alpha == 0:
        mend = "This initialisation divides by s: take lora_alpha > 0."
    else:
        mend = "Repeat what it was computed from (gradients, covariances), or take init_lora_weights=True."
    raise ValueError(
        f"Cannot create an adapter on module '{layer.name}': expected finite values, found NaN or infinity in "
        f"{', '.join(found)} {when} {init} (r={r}, lora_alpha={lora_alpha}). {mend} The base model is unchanged."
    )


def _peft_factors(
    layer: NewLayer, adapter: str, r: int, lora_alpha: float, config: DoraConfig, magnitude_only: bool
) -> lora.LoraLayer:
    """PEFT's own LoRA layer around the same base layer: its factors are taken over, the layer is dropped."""
    lora_config = config.to_lora_config(fan_in_fan_out=layer.fan_in_fan_out)
    lora_config.r, lora_config.lora_alpha = r, lora_alpha  # type: ignore[assignment]
    if magnitude_only:
        lora_config.init_lora_weights = True
    if lora_config.init_lora_weights == "loftq":
        # of a dictionary PEFT asks for both entries
        lora_config.loftq_config = {**vars(LoftQConfig()), **cast(dict[str, object], lora_config.loftq_config)}
    allowed = (True, False, "gaussian", "lora_ga")
    if layer.peft_layer is not lora.Linear and lora_config.init_lora_weights not in allowed:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not available for module '{layer.name}' "
            f"({type(layer.get_base_layer()).__name__}); PEFT has it for linear layers only. Use True, False or "
            "'gaussian', or leave the module out with exclude_modules."
        )
    try:
        return layer.peft_layer(layer.get_base_layer(), adapter, config=lora_config, r=r, lora_alpha=lora_alpha)
    except (torch.linalg.LinAlgError, ValueError) as error:
        if not _decomposes(config):
            raise
        raise ValueError(
            f"Cannot create an adapter on module '{layer.name}': init_lora_weights={config.init_lora_weights!r} failed "
            f"({error}). Repeat what it is computed from (gradients, covariances), or take init_lora_weights=True. The "
            "base model is unchanged."
        ) from error


def move_adapter(layer: NewLayer, adapter: str, device: torch.device) -> None:
    """Move an adapter's tensors to a device, in their dtypes; nothing happens on the meta device."""
    for name in layer.adapter_layer_names:
        held = getattr(layer, name)
        if adapter not in held or device.type == "meta":
            continue
        item = held[adapter]
        # of a computed one (masks, parametrizations) what it is computed from
        whole = held if isinstance(item, Tensor) else item
        for tensor in [item] if isinstance(item, nn.Parameter) else [*whole.parameters(), *whole.buffers()]:
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
