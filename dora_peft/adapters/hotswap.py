"""Hot-swapping: other tensors and scalings in the place of an adapter's, with the same parameters and modules.

An adapter of a smaller rank fits: its A and B are filled up with zeros, and lora_alpha follows, so that s stays what it
was. `prepare_ranks` gives the layers room for a larger one. `prepare_scalings` makes each s a tensor: torch.compile
makes a number a part of its graph, and would compile again for another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from peft.utils import save_and_load
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .. import norms, reference
from .._row_ranges import bare
from ..config import DoraConfig
from ..layers import DoraLayer
from .checkpoint import from_checkpoint, keys_of
from .names import belongs_to, exactly, to_parameter_names
from .swappable import check_options, initialisation_of_base, trained_beside, without_base
from .undo import remember, restored_on_failure


def swap(
    model: nn.Module, configs: dict[str, DoraConfig], path: str, adapter_name: str, torch_device: str | None
) -> None:
    """Replace an adapter's tensors and scalings by those of a checkpoint, in place.

    Args:
        model: The model whose modules are adapted.
        configs: Its adapters' configs by name; that of `adapter_name` is replaced.
        path: The checkpoint's folder or Hub repository.
        adapter_name: The adapter.
        torch_device: Where to read the checkpoint to.

    Raises:
        ValueError: The adapter is merged, or the checkpoint does not fit it. The old adapter is then untouched.
    """
    config = DoraConfig.from_pretrained(path)
    # Looked up in its module at each call, so that the patch of plugin/models.py is taken.
    tensors = save_and_load.load_peft_weights(path, device=torch_device)
    swap_tensors(model, configs, tensors, config, adapter_name, f"'{path}'")


def swap_tensors(
    model: nn.Module,
    configs: dict[str, DoraConfig],
    tensors: dict[str, Tensor],
    config: DoraConfig,
    adapter_name: str,
    source: str,
) -> None:
    """`swap` with what a checkpoint holds: its tensors, named without the adapter, and its config.

    Args:
        source: What the checkpoint is called in errors.
    """
    old = configs[adapter_name]
    check_options(old, config, adapter_name, source)
    layers = _layers(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Cannot hot-swap adapter '{adapter_name}' while it is merged. Call unmerge_adapter() first.")
    others = trained_beside(model, adapter_name, old)
    beside = {key: tensor for key, tensor in tensors.items() if key in others}
    tensors = without_base(model, {k: v for k, v in tensors.items() if k not in others}, adapter_name, source)
    with restored_on_failure(model, adapter_name):
        for written in [*others.values(), *_scaling_tensors(layers, adapter_name)]:
            remember(written, written.detach().clone())
        # The conversion of grouped convolutions from the checkpoint depends on the new scaling.
        for name, layer in layers.items():
            r = (
                layer.r[adapter_name]
                if layer.magnitude_only[adapter_name]
                else _of(config.rank_pattern, name, config.r)
            )
            scaling = _of(config.alpha_pattern, name, config.lora_alpha) / reference.alpha_divisor(r, config.use_rslora)
            _set_initial_scaling(layer, adapter_name, scaling)
            layer.detach_norm[adapter_name] = config.detach_norm
        tensors = _filled_up(model, layers, adapter_name, tensors)
        tensors = from_checkpoint(model, adapter_name, tensors, config)
        current = {n: p for n, p in model.named_parameters() if belongs_to(n, adapter_name)}
        named = to_parameter_names(model, adapter_name, tensors)
        _copy({**current, **others}, {**named, **beside}, adapter_name, source)
        config.inference_mode = old.inference_mode
        _describe(config, old, layers, adapter_name)
        configs[adapter_name] = config
        # last, as a tensor is written in place
        for layer in layers.values():
            layer.set_scale(adapter_name, 1.0)


def _scaling_tensors(layers: Mapping[str, DoraLayer], adapter: str) -> list[Tensor]:
    scalings: list[object] = [layer.scaling[adapter] for layer in layers.values()]
    return [scaling for scaling in scalings if isinstance(scaling, Tensor)]


def prepare_scalings(model: nn.Module) -> bool:
    """Turn the scalings of all DoRA layers into tensors; whether there are such layers."""
    layers = [module for module in model.modules() if isinstance(module, DoraLayer)]
    for layer in layers:
        weight = layer.base_weight()
        for adapter, scaling in layer.scaling.items():
            tensor = torch.as_tensor(scaling, dtype=weight.dtype, device=weight.device)
            # as PEFT's layers have it
            layer.scaling[adapter] = cast(float, tensor)
        layer._shortcut = None
    return bool(layers)


def prepare_ranks(model: nn.Module, configs: Mapping[str, object], target_rank: int) -> bool:
    """Fill A and B of all DoRA layers up to a rank, with zeros; whether there are such layers.

    Modules that train the magnitude alone stay as they are.

    Args:
        model: The model whose modules are adapted.
        configs: Its adapters' configs by name, which say so afterwards.
        target_rank: The largest rank of the adapters that will be swapped in.

    Raises:
        ValueError: An adapter has a larger rank, its initialisation changed W0, or a grouped convolution cannot have
            this one.
    """
    for adapter, config in configs.items():
        init = initialisation_of_base(config) if isinstance(config, DoraConfig) else None
        if init is not None and any(r != target_rank for r in _ranks(model, adapter)):
            raise ValueError(
                f"Cannot fill adapter '{adapter}' up to rank {target_rank}: init_lora_weights={init!r} took another "
                "part out of the base's weights than it would at that rank, so that a saved adapter could not be "
                "loaded again. Save it with path_initial_model_for_weight_conversion, and load that."
            )
    for layer in _layers(model).values():
        groups = getattr(layer.get_base_layer(), "groups", 1)
        for adapter, r in layer.r.items():
            if not all(isinstance(factor, nn.Parameter) for factor in layer.factor_parameters(adapter)):
                raise ValueError(
                    f"Cannot fill adapter '{adapter}' of module '{layer.name}' up: its factors are computed from "
                    "others (prune, parametrize). Remove the masks or parametrizations first."
                )
            if not layer.magnitude_only[adapter] and (r > target_rank or target_rank % groups):
                raise ValueError(
                    f"Cannot fill adapter '{adapter}' of module '{layer.name}' up to rank {target_rank}: expected its "
                    f"rank {r} or a larger one, and one that its {groups} groups divide."
                )
    for layer in _layers(model).values():
        for adapter in layer.r:
            if not layer.magnitude_only[adapter]:
                _fill_layer_up(layer, adapter, target_rank)
    norms.refresh(model)
    for adapter, config in configs.items():
        layers = _layers(model, adapter)
        if isinstance(config, DoraConfig) and layers:
            config.r, config.rank_pattern = target_rank, {}
            _describe_alphas(config, layers, adapter)
    return bool(_layers(model))


def _layers(model: nn.Module, adapter: str | None = None) -> dict[str, DoraLayer]:
    """The DoRA layers, those of an adapter if one is given, by the module's name in the base model."""
    named = [(bare(name), module) for name, module in model.named_modules() if isinstance(module, DoraLayer)]
    return {name: layer for name, layer in named if adapter is None or adapter in layer.r}


def _ranks(model: nn.Module, adapter: str) -> list[int]:
    layers = _layers(model, adapter).values()
    return [layer.r[adapter] for layer in layers if not layer.magnitude_only[adapter]]


T = TypeVar("T", int, float)


def _of(pattern: Mapping[str, T], name: str, default: T) -> T:
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _set_initial_scaling(layer: DoraLayer, adapter: str, scaling: float) -> None:
    """Have `lora_alpha` give this s at the rank that the layer has."""
    layer.lora_alpha[adapter] = scaling * reference.alpha_divisor(layer.r[adapter], layer.use_rslora[adapter])


def _fill_layer_up(layer: DoraLayer, adapter: str, rank: int) -> None:
    """Give A and B of one layer this rank, in new parameters of the same modules."""
    scaling, groups = layer.initial_scaling(adapter), getattr(layer.get_base_layer(), "groups", 1)
    holders, factors = layer.factor_modules(adapter), layer.factor_parameters(adapter)
    for is_A, (holder, factor) in zip((True, False), zip(holders, factors, strict=True), strict=True):
        filled = nn.Parameter(_filled(factor.detach(), rank, is_A, groups), requires_grad=factor.requires_grad)
        if isinstance(holder, nn.ParameterDict):
            holder[adapter] = filled
            continue
        holder.weight = filled
        for name in ("out_features", "out_channels") if is_A else ("in_features", "in_channels"):
            if hasattr(holder, name):
                setattr(holder, name, rank)
    layer.r[adapter] = rank
    _set_initial_scaling(layer, adapter, scaling)
    layer._shortcut = None


def _filled(factor: Tensor, rank: int, is_A: bool, groups: int) -> Tensor:
    """A [r, in, ...] or B [out, r / groups, ...] with zeros up to `rank`, behind each group's own."""
    if not is_A:
        out = factor.new_zeros(factor.shape[0], rank // groups, *factor.shape[2:])
        out[:, : factor.shape[1]] = factor
        return out
    out = factor.new_zeros(groups, rank // groups, *factor.shape[1:])
    out[:, : factor.shape[0] // groups] = factor.unflatten(0, (groups, -1))
    return out.flatten(0, 1)


def _filled_up(
    model: nn.Module, layers: Mapping[str, DoraLayer], adapter: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A checkpoint's tensors with A and B of a smaller rank filled up to the layers'."""
    out = dict(tensors)
    for name, layer in layers.items():
        groups = getattr(layer.get_base_layer(), "groups", 1)
        for is_A, key in zip((True, False), keys_of(f"{name}.", tensors)[:2], strict=True):
            own, rank = out.get(key), layer.r[adapter]
            if own is None or own.dim() < 2:
                continue
            smaller = own.shape[0] < rank if is_A else own.shape[1] * groups < rank
            if smaller and (not is_A or own.shape[0] % groups == 0):
                out[key] = _filled(own, rank, is_A, groups)
    return out


def _describe(config: DoraConfig, old: DoraConfig, layers: Mapping[str, DoraLayer], adapter: str) -> None:
    """Have the config of an adapter that was swapped in say which ranks the layers have, if they are others."""
    trained = {name: layer.r[adapter] for name, layer in layers.items() if not layer.magnitude_only[adapter]}
    if any(_of(config.rank_pattern, name, config.r) != r for name, r in trained.items()):
        config.r, config.rank_pattern = old.r, dict(old.rank_pattern)
        _describe_alphas(config, layers, adapter)


def _describe_alphas(config: DoraConfig, layers: Mapping[str, DoraLayer], adapter: str) -> None:
    alphas = {name: layer.lora_alpha[adapter] for name, layer in layers.items()}
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {exactly(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _copy(current: dict[str, Tensor], tensors: dict[str, Tensor], adapter_name: str, source: str) -> None:
    different = sorted(set(current) ^ set(tensors)) or sorted(
        name for name in current if current[name].shape != tensors[name].shape
    )
    if different:
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' with {source}: expected the same tensors of the same shapes, or "
            f"of a smaller rank, found a difference in {', '.join(different[:3])}{' ...' * (len(different) > 3)}. Load "
            "it under another name, or, for a larger rank, call peft.utils.hotswap.prepare_model_for_compiled_hotswap("
            "model, target_rank=...) first."
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(tensors[name])
