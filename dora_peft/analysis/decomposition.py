"""The measurement of dM and dD, as `dora_peft.analysis` defines them: of weights, of live models and of saved ones.

No norm is subtracted from a norm, and no cosine from 1, so that a change of 1e-8 is measured as well as one of 1, but
for its direction where D is nearly parallel to W0. With D = W - W0,
w = ||W0||, a = <W0, D>, d = ||D|| and v = ||W||, all per row and in float64:

    v - w = (2 a + d^2) / (v + w)        1 - cos = (w^2 d^2 - a^2) / (v w (v w + w^2 + a))

For D = s B A, a = s rowsum((W0 A^T) * B) and d^2 = s^2 rowsum((B A A^T) * B): no [out, in] matrix is built, and W0 is
read in blocks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bases.base import BaseWeight, Dense, base_weight
from ..reference import alpha_divisor

BLOCK_BYTES = 16 * 2**20  # rows of one weight in float64; three such blocks are alive together
# v^2 / (w^2 + d^2) below which a row of W counts as zero: what is left there is the rounding of float64.
ZERO = 1e-13
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?")


class Change(NamedTuple):
    """What training did to one module: dM, in the unit of the weight, and dD, from 0 to 2."""

    magnitude: float
    direction: float


def compare_weights(weight0: Tensor | BaseWeight, weight: Tensor | BaseWeight) -> Change:
    """The change from `weight0` to `weight`, both [out, in] (a kernel is flattened), read in blocks of rows.

    Raises:
        ValueError: The shapes differ.
    """
    base, trained = _seam(weight0), _seam(weight)
    shapes = [(seam.out_features, seam.in_features) for seam in (base, trained)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expected a weight of shape {shapes[0]}, as the pretrained one's, found {shapes[1]}")
    sums = []
    for (_, _, rows), (_, _, change) in zip(_blocks(base), _blocks(trained), strict=True):
        rows = rows.to(change.device)
        change = change - rows
        sums.append(torch.stack([_dot(rows, rows), _dot(rows, change), _dot(change, change)]).cpu())
    return _change(*torch.cat(sums, dim=1))


def compare_low_rank(
    base: Tensor | BaseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Change:
    """The change from W0 to W0 + s B A, or to m (W0 + s B A) / ||W0 + s B A||, without a matrix of size [out, in].

    Args:
        base: W0 [out, in], or the seam to it (`dora_peft.base_weight`).
        lora_A: A [r, in].
        lora_B: B [out, r].
        scaling: s.
        magnitude: DoRA's m, [out] or any shape of `out` elements; None for LoRA.

    Raises:
        ValueError: The shapes do not fit.
    """
    return _change(*_low_rank_sums(_seam(base), lora_A, lora_B, scaling), magnitude)


def _low_rank_sums(base: BaseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """w^2, a and d^2 [out] of W0 + s B A."""
    out, inner, r = base.out_features, base.in_features, len(lora_A)
    if (lora_A.shape, lora_B.shape) != ((r, inner), (out, r)):
        raise ValueError(
            f"expected A [r, {inner}] and B [{out}, r] for a weight of {out} x {inner}, found A {list(lora_A.shape)} "
            f"and B {list(lora_B.shape)}; take the base model that the adapter was trained on."
        )
    A, B = (factor.detach().to(base.device, torch.float64) for factor in (lora_A, lora_B))
    change2 = scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
    if base.has_rows:
        parts = [(_dot(rows, rows), _dot(rows @ A.T, B[start:stop])) for start, stop, rows in _blocks(base)]
        base2, dot = (torch.cat(part) for part in zip(*parts, strict=True))
    else:  # only a linear map, in the precision in which it computes
        base2, dot = base.row_norms_squared().double(), _dot(base.times(A.to(base.dtype)).double(), B)
    return base2.cpu(), scaling * dot.cpu(), change2.cpu()


def _seam(weight: Tensor | BaseWeight) -> BaseWeight:
    return Dense(weight, lambda w: w.flatten(1)) if isinstance(weight, Tensor) else weight


def _blocks(base: BaseWeight) -> Iterator[tuple[int, int, Tensor]]:
    step = max(1, BLOCK_BYTES // (8 * base.in_features))
    for start in range(0, base.out_features, step):
        stop = min(start + step, base.out_features)
        if getattr(base, "groups", 1) > 1:  # whose blocks hold the channels of one group only
            yield start, stop, base.rows(torch.arange(start, stop, device=base.device)).double()
        else:
            yield start, stop, base.block(start, stop).double()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("oi,oi->o", x, y)  # a batched product: x * y is not stored


def _change(base2: Tensor, dot: Tensor, change2: Tensor, magnitude: Tensor | None = None) -> Change:
    """dM and dD from w^2, a and d^2, each [out]."""
    total2 = base2 + 2 * dot + change2
    total2 = total2.masked_fill(total2 <= ZERO * (base2 + change2), 0.0)
    w, v = base2.sqrt(), total2.sqrt()
    product, cosine = w * v, base2 + dot  # the cosine times w v
    # Where it is negative, w v - cosine adds two positive numbers, and the other form would subtract them.
    apart = torch.where(
        cosine < 0,
        (product - cosine) / product,
        (base2 * change2 - dot**2).clamp(min=0) / (product * (product + cosine)),
    )
    apart = apart[product != 0]  # keeps NaN, so that a diverged module does not look unchanged
    if magnitude is None:
        grown = ((2 * dot + change2) / (v + w)).masked_fill(v + w == 0, 0.0)
    elif magnitude.numel() == len(w):
        grown = magnitude.detach().cpu().double().flatten() - w
    else:
        raise ValueError(f"expected a magnitude of {len(w)} elements, one per output row, found {magnitude.numel()}")
    return Change(grown.abs().mean().item(), apart.mean().item() if len(apart) else 0.0)


@torch.no_grad()
def decompose(
    model: nn.Module,
    *,
    reference: nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor] | None = None,
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


def _adapted_change(module: Any, adapter: str, name: str) -> Change:
    """Of a live layer of ours or of PEFT's."""
    ours = hasattr(module, "base_weight")
    if not ours and module.merged:
        raise ValueError("expected W0 in the base layer, found merged adapters; call model.unmerge_adapter() before.")
    base = module.base_weight() if ours else base_weight(module.get_base_layer(), name)
    if ours:
        lora_A, lora_B = module.factors(adapter)
    elif adapter in module.lora_A:
        lora_A, lora_B = (part[adapter].weight.flatten(1) for part in (module.lora_A, module.lora_B))
    else:
        lora_A, lora_B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    sums = _low_rank_sums(base, lora_A, lora_B, float(module.scaling[adapter]))
    if adapter not in module.lora_magnitude_vector:
        return _change(*sums)
    if ours and bool((sums[0] == 0).any()):
        module.scale(adapter)  # the magnitude of a zero row follows its norm, once that is up to date
    return _change(*sums, module.lora_magnitude_vector[adapter].weight)


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
    except (ValueError, SafetensorError) as error:  # the latter of a file that was cut off
        raise ValueError(f"{folder}: {error}") from error


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has LoRA or DoRA layers; without, it counts as fully fine-tuned."""
    return bool(_adapted(_root(model)))


def copy_weights(model: nn.Module, target: str | None = None) -> dict[str, Tensor]:
    """W0 of a model that is going to be fully fine-tuned, in CPU memory: a `reference` for `decompose`."""
    linears = _select(_linears(_root(model)), target)
    return {name: module.weight.detach().to("cpu", copy=True) for name, module in linears.items()}


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
            scaling = alpha / alpha_divisor(rank, bool(config.get("use_rslora")))
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


def _existing(path: Path, found: Any) -> Path:
    if not path.is_file():
        raise ValueError(f"expected {path.name}, found {found}; only safetensors are read, so save it as such.")
    return path


def _root(model: nn.Module) -> nn.Module:
    """The base model inside PEFT's wrappers, after which the modules are named."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model  # type: ignore[return-value]


def _adapted(root: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in root.named_modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)}


def _linears(root: nn.Module) -> dict[str, nn.Module]:
    output = root.get_output_embeddings() if isinstance(root, transformers.PreTrainedModel) else None
    return {n: m for n, m in root.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not output}


def _pretrained(reference: Any, name: str, module: nn.Module) -> BaseWeight:
    """W0 of one module, whose kind says how a tensor is laid out."""
    try:
        if isinstance(reference, nn.Module):
            return base_weight(_root(reference).get_submodule(name), name)
        weight = reference[name] if isinstance(reference, Mapping) else reference(name)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"expected the pretrained weight of module '{name}' in `reference`, found none.") from error
    return base_weight(module, name, weight)


def _select(modules: dict[str, Any], target: str | None) -> dict[str, Any]:
    chosen = {name: module for name, module in modules.items() if target is None or re.search(target, name)}
    if not chosen:
        raise ValueError(
            f"expected modules whose path matches '{target or ''}', found {list(modules)[:3] or 'none'} ..."
        )
    return chosen


def _named(name: str, compare: Callable[..., Change], *arguments: Any) -> Change:
    try:
        return compare(*arguments)
    except ValueError as error:
        raise ValueError(f"module '{name}': {error}") from error
