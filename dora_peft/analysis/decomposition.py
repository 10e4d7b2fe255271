"""`decompose` and `decompose_folder`: the changes of all modules of live models and of saved ones."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import reference as algorithm
from ..bases import BaseWeight, base_weight
from .change import Change, change_of, compare_low_rank, compare_weights, low_rank_sums

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?")
# W0 of a fully fine-tuned model: the pretrained model, or its weights by module path.
Reference = nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor]
P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Readable(Protocol):
    """What is used of a `DoraLayer`; PEFT's layers have none of it."""

    def base_weight(self) -> BaseWeight: ...
    def factors(self, adapter: str) -> tuple[Tensor, Tensor]: ...
    def scale(self, adapter: str) -> Tensor: ...


@torch.no_grad()
def decompose(
    model: nn.Module,
    *,
    reference: Reference | None = None,
    adapter: str = "default",
    target: str | None = None,
) -> dict[str, Change]:
    """The change of every module that an adapter adapts or, without adapters, of every linear layer but the output's.

    Args:
        model: A PeftModel, a DoraModel or LoraModel, a model with `add_adapter`, or a fully fine-tuned model.
        reference: W0 of a fully fine-tuned model: the pretrained model, a mapping from module path to weight, or a
            function from one to the other.
        adapter: Which adapter, taken alone, whatever others are active.
        target: A regular expression that is searched in the modules' paths.

    Returns:
        Changes by module path, named as in the base model.

    Raises:
        ValueError: No such adapter or module, no reference for a full model, or an adapter that PEFT merged into W0.
    """
    root = _root(model)
    adapted = _adapted(root)
    if not adapted:
        if reference is None:
            raise ValueError(
                f"{type(root).__name__} has no LoRA or DoRA layers, so it counts as fully fine-tuned: expected "
                "`reference`, the pretrained model or its weights by module path, found None."
            )
        linears = _select(_linears(root), target)
        return {
            n: _named(n, compare_weights, _pretrained(reference, n, m), base_weight(m, n)) for n, m in linears.items()
        }
    if reference is not None:
        raise ValueError("`reference` is for fully fine-tuned models; an adapted one has W0 in its base layers.")
    chosen = {n: m for n, m in adapted.items() if adapter in m.lora_A or adapter in m.lora_embedding_A}
    if not chosen:
        names = sorted({name for m in adapted.values() for name in (*m.lora_A, *m.lora_embedding_A)})
        raise ValueError(f"expected an adapter named '{adapter}', found {names}; choose one of these by `adapter`.")
    return {n: _named(n, _adapted_change, m, adapter, n) for n, m in _select(chosen, target).items()}


def _adapted_change(module: LoraLayer, adapter: str, name: str) -> Change:
    """Of a live layer of PEFT's, or of a DoraLayer, which has the same attributes."""
    if isinstance(module, Readable):
        base, (lora_A, lora_B) = module.base_weight(), module.factors(adapter)
    elif module.merged:
        raise ValueError("expected W0 in the base layer, found merged adapters; call model.unmerge_adapter() before.")
    else:
        base = base_weight(module.get_base_layer(), name)
        if adapter in module.lora_A:
            lora_A, lora_B = (_weight_of(part[adapter]).flatten(1) for part in (module.lora_A, module.lora_B))
        else:
            lora_A, lora_B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    sums = low_rank_sums(base, lora_A, lora_B, float(module.scaling[adapter]))
    if adapter not in module.lora_magnitude_vector:
        return change_of(*sums)
    if isinstance(module, Readable) and bool((sums[0] == 0).any()):
        # the magnitude of a zero row follows its norm, once that is up to date
        module.scale(adapter)
    return change_of(*sums, _weight_of(module.lora_magnitude_vector[adapter]))


def decompose_folder(
    base_model: nn.Module, folder: str | os.PathLike[str], *, target: str | None = None
) -> dict[str, Change]:
    """The same from a saved LoRA or DoRA adapter, or from a saved fully fine-tuned model, tensor by tensor.

    Modules that PEFT saves whole (`modules_to_save`) are left out.

    Args:
        base_model: The pretrained model, without adapters.
        folder: With adapter_config.json and adapter_model.safetensors, or with model.safetensors, whole or sharded.
        target: As for `decompose`.

    Raises:
        ValueError: A file, a tensor or a module is missing, or a shape does not fit.
    """
    folder, root = Path(folder), _root(base_model)
    try:
        if (folder / "adapter_config.json").is_file():
            return _decompose_adapter(root, folder, target)
        return _decompose_full(root, folder, target)
    # the latter of a file that was cut off
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has LoRA or DoRA layers; without, it counts as fully fine-tuned."""
    return bool(_adapted(_root(model)))


def copy_weights(model: nn.Module, target: str | None = None) -> dict[str, Tensor]:
    """W0 of a model that is going to be fully fine-tuned, in CPU memory: a `reference` for `decompose`."""
    linears = _select(_linears(_root(model)), target)
    return {name: _weight_of(module).detach().to("cpu", copy=True) for name, module in linears.items()}


def _decompose_adapter(root: nn.Module, folder: Path, target: str | None) -> dict[str, Change]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") not in ("LORA", "DORA"):
        raise ValueError(f"expected an adapter with peft_type LORA or DORA, found {config.get('peft_type')}.")
    path = _existing(folder / "adapter_model.safetensors", sorted(p.name for p in folder.iterdir()))
    changes = {}
    with safe_open(path, "pt") as file:
        keys: dict[str, dict[str, str]] = {}
        for key in file.keys():  # noqa: SIM118, safe_open is no mapping
            if match := _KEY.fullmatch(key):
                keys.setdefault(match[1], {})[match[2]] = key
        modules = dict(root.named_modules(remove_duplicate=False))
        unknown = [name for name in keys if name not in modules]
        if unknown:
            raise ValueError(
                f"expected modules of {type(root).__name__}, found {unknown[:3]}, which it has not; load the base "
                f"model that the adapter was trained on ({config.get('base_model_name_or_path')}) by the same class."
            )
        for name, parts in _select({name: keys[name] for name in modules if name in keys}, target).items():
            expected = {"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}
            if expected - set(parts):
                raise ValueError(
                    f"expected lora_{', lora_'.join(sorted(expected))} for module '{name}', found "
                    f"{sorted(parts.values())}; save the adapter again."
                )
            tensors = {part: file.get_tensor(key) for part, key in parts.items()}
            ranks: dict[str, int] = config.get("rank_pattern") or {}
            alphas: dict[str, float] = config.get("alpha_pattern") or {}
            rank = ranks.get(get_pattern_key(list(ranks), name), config["r"])
            alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
            if rank != len(tensors["A"]):
                raise ValueError(
                    f"expected rank {rank} in module '{name}', from the config, found {len(tensors['A'])}."
                )
            scaling = alpha / algorithm.alpha_divisor(rank, bool(config.get("use_rslora")))
            factors = tensors["A"].flatten(1), tensors["B"].flatten(1)
            base = base_weight(modules[name], name)
            changes[name] = _named(name, compare_low_rank, base, *factors, scaling, tensors.get("magnitude_vector"))
    return changes


def _decompose_full(root: nn.Module, folder: Path, target: str | None) -> dict[str, Change]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        with safe_open(_existing(folder / "model.safetensors", names), "pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    changes = {}
    for name, module in _select(_linears(root), target).items():
        key = f"{name}.weight"
        if key not in files:
            raise ValueError(
                f"expected a tensor '{key}' for {type(root).__name__}, found {sorted(files)[:3]} ...; load "
                "the base model by the class that was fine-tuned."
            )
        with safe_open(_existing(folder / files[key], sorted(set(files.values()))), "pt") as file:
            weight = file.get_tensor(key)
        changes[name] = _named(name, compare_weights, base_weight(module, name), base_weight(module, name, weight))
    return changes


def _existing(path: Path, found: object) -> Path:
    if not path.is_file():
        raise ValueError(f"expected {path.name}, found {found}; only safetensors are read, so save it as such.")
    return path


def _root(model: nn.Module) -> nn.Module:
    """The base model inside PEFT's wrappers, after which the modules are named."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model  # type: ignore[return-value]


def _adapted(root: nn.Module) -> dict[str, LoraLayer]:
    layers = {n: m for n, m in root.named_modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)}
    return cast("dict[str, LoraLayer]", layers)


def _linears(root: nn.Module) -> dict[str, nn.Module]:
    output = root.get_output_embeddings() if isinstance(root, transformers.PreTrainedModel) else None
    return {n: m for n, m in root.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not output}


def _pretrained(reference: Reference, name: str, module: nn.Module) -> BaseWeight:
    """W0 of one module, whose kind says how a tensor is laid out."""
    try:
        if isinstance(reference, nn.Module):
            return base_weight(_root(reference).get_submodule(name), name)
        weight = reference[name] if isinstance(reference, Mapping) else reference(name)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"expected the pretrained weight of module '{name}' in `reference`, found none.") from error
    return base_weight(module, name, weight)


def _select(modules: dict[str, T], target: str | None) -> dict[str, T]:
    chosen = {name: module for name, module in modules.items() if target is None or re.search(target, name)}
    if not chosen:
        raise ValueError(
            f"expected modules whose path matches '{target or ''}', found {list(modules)[:3] or 'none'} ..."
        )
    return chosen


def _named(name: str, compare: Callable[P, Change], *args: P.args, **kwargs: P.kwargs) -> Change:
    try:
        return compare(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"module '{name}': {error}") from error


def _weight_of(module: nn.Module) -> Tensor:
    """A parameter, or what is computed in the place of one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
