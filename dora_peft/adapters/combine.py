"""Combining adapters: a new one whose merged weight is W0 + sum_i w_i (W'_i - W0), as one DoRA adapter.

The algebra is in ops/merging.py. Here are which adapters can be combined, the new one's config, and its tensors.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .. import norms
from ..config import DoraConfig
from ..layers import DoraLayer
from ..ops import merging
from ..reference import alpha_divisor
from .names import exactly
from .undo import restored_on_failure


@dataclass
class _Parts:
    """The adapters of one layer that are combined there, with their weights, and the new adapter's rank."""

    layer: DoraLayer
    weighted: list[tuple[str, float]]
    rank: int


def check(
    configs: dict[str, DoraConfig],
    adapters: list[str],
    weights: list[float],
    combination_type: str,
    unsupported: dict[str, object],
) -> None:
    """Refuse what has no weighted sum; see `DoraModel.add_weighted_adapter`.

    Raises:
        ValueError: Another combination_type or option, or other adapters than there are.
    """
    if combination_type not in ("cat", "svd") or any(v is not None for v in unsupported.values()):
        what = combination_type if combination_type not in ("cat", "svd") else ", ".join(unsupported)
        raise ValueError(
            f"add_weighted_adapter supports combination_type 'cat' and 'svd' for DoRA, found {what!r}: m * (W0 + s "
            "B A) / ||W0 + s B A|| is not linear in A and B, so methods that combine these alone give another "
            "weight than the weighted sum."
        )
    missing = [name for name in adapters if name not in configs]
    if missing or not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"Expected existing adapters ({', '.join(configs)}) and as many weights, found adapters={adapters}, "
            f"weights={weights}."
        )


def add_combined(
    tuner: BaseTuner, weighted: list[tuple[str, float]], adapter_name: str, combination_type: str, svd_rank: int | None
) -> None:
    """Add the weighted sum of adapters to a model.

    Args:
        tuner: The DoraModel.
        weighted: The adapters with their weights w_i.
        adapter_name: Name of the new adapter.
        combination_type: "cat" for the exact sum, "svd" for one of rank `svd_rank`.
        svd_rank: The largest r_i if None.

    Raises:
        ValueError: The adapters cannot be combined. The model is then as before.
    """
    wrappers = [m for m in tuner.modules() if isinstance(m, ModulesToSaveWrapper)]
    if any(sum(name in w.modules_to_save for name, _ in weighted) > 1 for w in wrappers):
        raise ValueError("Cannot add weighted adapters if they target the same module with modules_to_save.")
    parts = _parts_by_layer(tuner.model, weighted, svd_rank, exact=combination_type == "cat")
    first = cast(DoraConfig, tuner.peft_config[weighted[0][0]])
    with restored_on_failure(tuner):
        tuner.peft_config[adapter_name] = _config(first, {name: part.rank for name, part in parts.items()})
        tuner.inject_adapter(tuner.model, adapter_name)
        for part in parts.values():
            _fill_layer(part, adapter_name)


def _parts_by_layer(
    model: nn.Module, weighted: list[tuple[str, float]], svd_rank: int | None, exact: bool
) -> dict[str, _Parts]:
    parts: dict[str, _Parts] = {}
    for name, layer in model.named_modules():
        present = [(a, w) for a, w in weighted if isinstance(layer, DoraLayer) and a in layer.lora_magnitude_vector]
        if not isinstance(layer, DoraLayer) or not present:
            continue
        # The sum is defined by merged weights, so a layer that has none has no sum either.
        obstacle = layer.kind.merge_obstacle(layer.get_base_layer())
        if obstacle is not None:
            raise ValueError(f"Adapters of module '{name}' cannot be combined: {obstacle}")
        parts[name] = _Parts(layer, present, rank=sum(layer.r[a] for a, _ in present))
    if not exact:
        largest = max(part.layer.r[a] for part in parts.values() for a, _ in part.weighted)
        for part in parts.values():
            part.rank = min(svd_rank or largest, part.rank)
    return parts


def _config(first: DoraConfig, ranks: dict[str, int]) -> DoraConfig:
    """The new adapter's config: that of the first one, for these modules with these ranks."""
    config = copy.deepcopy(first)
    # So that s = 1: the scalings are part of the new B.
    alphas = {name: alpha_divisor(r, config.use_rslora) for name, r in ranks.items()}
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    config.rank_pattern = {exactly(name): r for name, r in ranks.items()}
    config.alpha_pattern = {exactly(name): alpha for name, alpha in alphas.items()}
    # PEFT matches a regular expression in full, but a list of names by their ends.
    config.target_modules, config.magnitude_only_modules = "|".join(map(re.escape, ranks)), None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.layer_replication = None
    config.init_lora_weights, config.inference_mode = False, True
    return config


@torch.no_grad()
def _fill_layer(part: _Parts, adapter_name: str) -> None:
    layer, names = part.layer, [name for name, _ in part.weighted]
    weight = layer.base_weight()
    adapters = []
    for name in names:
        lora_A, lora_B = (t.detach().to(weight.device, weight.dtype) for t in layer.factors(name))
        c = layer.scale(name).to(weight.device, weight.dtype)
        adapters.append((lora_A, lora_B, float(layer.scaling[name]), c))
    lora_A, lora_B, k = merging.weighted_sum(adapters, [w for _, w in part.weighted])
    if part.rank < lora_A.shape[0]:
        lora_A, lora_B = merging.truncate(lora_A, lora_B, part.rank)
    new_A, new_B = layer.factor_parameters(adapter_name)
    new_A.zero_()
    new_B.zero_()
    # Truncation gives fewer than `rank` rows if the layer is smaller than that.
    new_A.flatten(1)[: lora_A.shape[0]].copy_(lora_A)
    new_B.flatten(1)[:, : lora_B.shape[1]].copy_(lora_B)
    norms.settle_as(layer, adapter_name, _tied_in_all(layer, names))
    layer.magnitude(adapter_name).view(-1).copy_(k * norms.up_to_date(layer, adapter_name).value)


def _tied_in_all(layer: DoraLayer, names: list[str]) -> Tensor | None:
    """The rows [out] that are tied in every one of these adapters: c is 1 in all of them, so in the sum too."""
    masks = [norms.up_to_date(layer, name).tied for name in names]
    known = [mask for mask in masks if mask is not None]
    tied = torch.stack(known).all(0) if len(known) == len(masks) else None
    return tied if tied is not None and bool(tied.any()) else None
