"""How far training moved each module in magnitude and in direction: the paper's weight-decomposition analysis.

Per output row j, with W0 the pretrained and W the trained weight (Eq. 3 and 4 of arXiv 2402.09353):

    dM = mean_j | m[j] - ||W0[j]|| |          m[j] = ||W[j]||, or DoRA's magnitude parameter
    dD = mean_j (1 - cos(W[j], W0[j]))        rows that are zero in W0 or W have no direction and are left out

    python -m dora_peft.analysis BASE ADAPTER... [--gguf_file F] [--output pattern.png] [--modules 'q_proj|v_proj']

BASE is a model folder or Hub id; each ADAPTER the folder of a LoRA, a DoRA or a fully fine-tuned model, or a training
run's output folder, whose checkpoint-*/ make one trajectory. Printed is the correlation of dD and dM of each run;
pattern.png shows it, pattern_trajectories.png too where a run has several checkpoints, pattern.json has all numbers.

Nothing subtracts nearly equal numbers, so that a change of 1e-8 is measured as exactly as one of 1. With D = W - W0,
w = ||W0||, a = <W0, D>, d = ||D|| and v = ||W||, all per row and in float64:

    v - w = (2 a + d^2) / (v + w)        1 - cos = (w^2 d^2 - a^2) / (v w (v w + w^2 + a))

For D = s B A, a = s rowsum((W0 A^T) * B) and d^2 = s^2 rowsum((B A A^T) * B): no [out, in] matrix is built, and W0 is
read in blocks. W0 is the base layer's weight as it is; PiSSA and its kin, which change it, are compared with that.
Weights that are sharded across processes (FSDP, ZeRO-3) have to be saved first and read by `decompose_folder`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ._files import atomic_write_text, staged_directory
from .base_weight import BaseWeight, Dense, base_weight

BLOCK_BYTES = 16 * 2**20  # rows of one weight in float64; three such blocks are alive together
# v^2 / (w^2 + d^2) below which a row of W counts as zero: what is left there is the rounding of float64.
ZERO = 1e-13
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

History = list[dict[str, Any]]


class Change(NamedTuple):
    """What training did to one module: dM, in the unit of the weight, and dD, from 0 to 2."""

    magnitude: float
    direction: float


class Correlation(NamedTuple):
    """Pearson's r of dD and dM, its confidence interval, and the number of points; nan where undefined."""

    r: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # over tuple.count, which nobody calls here


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
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
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


class DecompositionCallback(transformers.TrainerCallback):
    """Records `decompose` during training, and costs one pass over the adapted weights at each record.

        callback = DecompositionCallback(steps=50, path="pattern.json")
        Trainer(model, ..., callbacks=[callback]).train()
        correlate(callback.history)

    Args:
        steps: A record is made every so many optimizer steps, and at the end.
        path: A JSON file, written whole at each record. A resumed run goes on from its records.
        reference: W0 of a fully fine-tuned model, as for `decompose`. Without it W0 is copied to CPU memory when
            training begins, in each module's own dtype.
        adapter: The adapter's name.
        target: As for `decompose`.

    Attributes:
        history: One {"step", "module", "magnitude", "direction"} per record and module. On world process zero only.
    """

    def __init__(
        self,
        steps: int,
        path: str | os.PathLike[str] | None = None,
        reference: Any = None,
        *,
        adapter: str = "default",
        target: str | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"expected steps of at least 1, found {steps}")
        self.steps, self.path, self.reference = steps, None if path is None else Path(path), reference
        self.adapter, self.target = adapter, target
        self.history: History = []
        self._weights0 = reference

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.history, self._weights0 = [], self.reference
        if state.global_step and self.path is not None and self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.history = [entry for entry in stored if entry["step"] <= state.global_step]
        if self.reference is None and not _adapted(_root(model)):
            if state.global_step:
                raise ValueError(
                    f"training resumes at step {state.global_step}, where the weights are no longer the pretrained "
                    "ones; give DecompositionCallback the pretrained model as `reference`."
                )
            linears: dict[str, Any] = _select(_linears(_root(model)), self.target)
            self._weights0 = {n: m.weight.detach().to("cpu", copy=True) for n, m in linears.items()}
        self._changes(model)  # an adapter or a reference that is missing shows now, not at the first record

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            self._record(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not args.load_best_model_at_end:  # which has replaced the weights of the last step
            self._record(state, model)

    def _record(self, state: Any, model: Any) -> None:
        step = state.global_step
        if not state.is_world_process_zero or (self.history and self.history[-1]["step"] == step):
            return
        self.history += to_history(step, self._changes(model))
        if self.path is not None:
            atomic_write_text(str(self.path), json.dumps(self.history, indent=1) + "\n")

    def _changes(self, model: Any) -> dict[str, Change]:
        return decompose(model, reference=self._weights0, adapter=self.adapter, target=self.target)


def to_history(step: int, changes: Mapping[str, Change]) -> History:
    """One {"step", "module", "magnitude", "direction"} per module."""
    return [{"step": step, "module": name, **change._asdict()} for name, change in changes.items()]


def correlate(history: History, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Correlation:
    """Pearson's correlation of dD and dM over modules and checkpoints, as in the paper's Fig. 2.

    The points of one module at several checkpoints are not independent, so the percentile bootstrap of the interval
    draws modules, each with all of its points. r is nan where dD or dM is constant or not finite, the interval also
    with one module.
    """
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"expected a level between 0 and 1 and at least 1 draw, found {level} and {draws}")
    points = torch.tensor([[e["direction"], e["magnitude"]] for e in history], dtype=torch.float64).view(-1, 2)
    if not len(points) or not points.isfinite().all() or (points.amax(0) == points.amin(0)).any():
        return Correlation(math.nan, math.nan, math.nan, len(points))
    number = {name: i for i, name in enumerate(dict.fromkeys(entry["module"] for entry in history))}
    x, y = ((points - points.mean(0)) / (points.amax(0) - points.amin(0))).unbind(1)
    powers = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    sums = torch.zeros(len(number), 6, dtype=torch.float64)
    sums.index_add_(0, torch.tensor([number[entry["module"]] for entry in history]), powers)
    picks = torch.randint(len(number), (draws, len(number)), generator=torch.Generator().manual_seed(seed))
    drawn = _pearson(
        torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(
            1, picks, torch.ones(picks.shape, dtype=torch.float64)
        )
        @ sums
    )
    drawn = drawn[drawn.isfinite()]
    low = high = math.nan
    if len(number) > 1 and len(drawn):
        low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Correlation(_pearson(sums.sum(0)).item(), low, high, len(points))


def _pearson(sums: Tensor) -> Tensor:
    """r from the sums [..., 6] of 1, x, y, x^2, y^2 and xy; nan where x or y is constant up to rounding."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    var_x, var_y = xx - x * x / n, yy - y * y / n
    r = (xy - x * y / n) / (var_x * var_y).clamp(min=0).sqrt()
    return r.masked_fill((var_x <= 1e-12 * xx) | (var_y <= 1e-12 * yy), math.nan).clamp(-1, 1)


def layer_kind(module_path: str) -> str:
    """The last component of a module's path, such as "q_proj"."""
    return module_path.rpartition(".")[2]


def _depth(module_path: str) -> int:
    """The number of the layer, the first one in the path."""
    return next((int(part) for part in module_path.split(".") if part.isdigit()), 0)


def draw_pattern(
    histories: Mapping[str, History], title: str, path: str | os.PathLike[str] | Any, *, level: float = 0.95
) -> None:
    """Draw dM over dD, one panel per method: colour by optimizer step, size by depth, regression line, r.

    Args:
        histories: Records by method, such as `DecompositionCallback.history`.
        title: Of the whole figure.
        path: A file, whose suffix says the format, or a binary buffer for a PNG.
        level: Of the interval.
    """
    figure, panels = _figure(title, 1, list(histories), (4.2, 4.0))
    entries = [entry for history in histories.values() for entry in history]
    steps, depths = [e["step"] for e in entries], [_depth(e["module"]) for e in entries]
    points: Any = None
    for axes, (method, history) in zip(panels[0], histories.items(), strict=True):
        x, y = [e["direction"] for e in history], [e["magnitude"] for e in history]
        largest = 60 if len(history) < 200 else 25
        size = [8 + largest * _depth(e["module"]) / max(1, *depths) for e in history]
        shades = {"cmap": "viridis", "vmin": min(steps), "vmax": max(steps)}
        points = axes.scatter(
            x, y, s=size, c=[e["step"] for e in history], alpha=0.7, edgecolors="white", linewidths=0.4, **shades
        )
        r, low, high, _ = correlate(history, level)
        if math.isfinite(r):
            mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
            slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
                (a - mean_x) ** 2 for a in x
            )
            ends = min(x), max(x)
            axes.plot(ends, [mean_y + slope * (end - mean_x) for end in ends], "--", color="0.25", linewidth=1.2)
        axes.set_title(f"{method}\nr = {r:+.2f} [{low:+.2f}, {high:+.2f}]", fontsize="medium", pad=14)
        axes.set_xlabel("change of direction \u0394D")
        axes.ticklabel_format(style="sci", scilimits=(-2, 3))
        axes.locator_params(nbins=5)
    panels[0, 0].set_ylabel("change of magnitude \u0394M")
    if len(set(steps)) > 1:
        ticks = sorted(set(steps)) if len(set(steps)) < 10 else None
        figure.colorbar(points, ax=list(panels[0]), label="optimizer step", ticks=ticks)
    if len(set(depths)) > 1:
        figure.supxlabel("larger markers: deeper layers", fontsize="small")
    _save(figure, path)


def draw_trajectories(histories: Mapping[str, History], title: str, path: str | os.PathLike[str] | Any) -> None:
    """Draw the mean dM and dD over the optimizer steps, one column per kind of layer, one line per method.

    Args:
        histories, title, path: As for `draw_pattern`.
    """
    kinds = list(dict.fromkeys(layer_kind(e["module"]) for history in histories.values() for e in history))
    figure, panels = _figure(title, 2, kinds, (2.4, 2.3))
    for row, (key, label) in zip(panels, {"magnitude": "\u0394M", "direction": "\u0394D"}.items(), strict=True):
        # magnitudes that are trained alone turn nothing, and 0 has no logarithm
        scale = "log" if all(e[key] > 0 for history in histories.values() for e in history) else "linear"
        for axes, kind in zip(row, kinds, strict=True):
            for method, history in histories.items():
                values: dict[int, list[float]] = {}
                for entry in history:
                    if layer_kind(entry["module"]) == kind:
                        values.setdefault(entry["step"], []).append(entry[key])
                axes.plot(sorted(values), [sum(values[s]) / len(values[s]) for s in sorted(values)], ".-", label=method)
            axes.set_yscale(scale)
            axes.grid(alpha=0.3)
            axes.locator_params(axis="x", nbins=4)
        row[0].set_ylabel(f"mean {label}")
    for top, bottom, kind in zip(*panels, kinds, strict=True):
        top.set_title(kind)
        bottom.set_xlabel("optimizer step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(histories))
    _save(figure, path)


def _figure(title: str, rows: int, columns: Sequence[str], size: tuple[float, float]) -> tuple[Any, Any]:
    if not columns:
        raise ValueError("expected records of at least one method to draw, found none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figures need matplotlib: pip install 'dora-peft[plot]'") from error
    figure = Figure(figsize=(size[0] * len(columns) + 0.8, size[1] * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(
        rows, len(columns), squeeze=False, sharex=rows > 1, sharey="row" if rows > 1 else False
    )


def _save(figure: Any, path: Any) -> None:
    if hasattr(path, "write"):
        figure.savefig(path, format="png", dpi=150)
        return
    with staged_directory(str(Path(path).parent)) as staging:
        figure.savefig(Path(staging) / Path(path).name, dpi=150)


def load_base(name: str, model_class: str = "AutoModelForCausalLM", gguf_file: str | None = None) -> nn.Module:
    """A pretrained model by folder or Hub id, unpacked where it is a GGUF file."""
    options: dict[str, Any] = {"gguf_file": gguf_file}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Older releases always unpack; newer ones may keep the weights packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if not hasattr(transformers, model_class):
        raise ValueError(f"expected a model class of transformers, found {model_class!r}")
    return getattr(transformers, model_class).from_pretrained(name, **options)


def read_run(base_model: nn.Module, folder: str | os.PathLike[str], target: str | None = None) -> History:
    """The records of a saved model, or of all checkpoint-*/ in a training run's output folder."""
    folder = Path(folder)
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in (folder, *folder.glob("checkpoint-*"))}
    steps = {path: int(match[1]) for path, match in found.items() if match} or {folder: 0}
    history: History = []
    for path in tqdm(sorted(steps, key=lambda path: steps[path]), desc=folder.name, disable=len(steps) == 1):
        history += to_history(steps[path], decompose_folder(base_model, path, target=target))
    return history


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m dora_peft.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the pretrained model")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", type=Path, help="folder of an adapter, model or run")
    parser.add_argument("--gguf_file", help="GGUF file in BASE")
    parser.add_argument("--model_class", default="AutoModelForCausalLM", help="class of transformers to load BASE by")
    parser.add_argument("--modules", metavar="REGEX", help="searched in the paths of the modules")
    parser.add_argument("--output", type=Path, default=Path("pattern.png"), help="figure; the numbers lie beside it")
    args = parser.parse_args(argv)
    names = [path.name for path in args.adapters]
    runs = {str(path) if names.count(path.name) > 1 else path.name: path for path in args.adapters}
    try:
        re.compile(args.modules or "")
        base = load_base(args.base, args.model_class, args.gguf_file)
        histories = {name: read_run(base, path, args.modules) for name, path in runs.items()}
        draw_pattern(histories, f"{Path(args.base).name}: magnitude and direction", args.output)
        if any(len({entry["step"] for entry in history}) > 1 for history in histories.values()):
            second = args.output.with_stem(f"{args.output.stem}_trajectories")
            draw_trajectories(histories, f"{Path(args.base).name}: change by kind of layer", second)
    except (ValueError, OSError, ImportError, re.error) as error:
        parser.error(str(error))
    content: dict[str, Any] = {"base": args.base, "level": 0.95, "runs": {}}
    print(f"{'run':32} {'points':>6}  {'r of dD and dM':>14}  95 % interval")
    for name, history in histories.items():
        groups = {name: history}
        for entry in history:
            groups.setdefault(f"  {layer_kind(entry['module'])}", []).append(entry)
        found = {group: correlate(entries) for group, entries in groups.items()}
        for group, (r, low, high, count) in found.items():
            print(f"{group:32} {count:6}  {r:+14.2f}  [{low:+.2f}, {high:+.2f}]")
        by_group = {
            g.strip(): {k: v if math.isfinite(v) else None for k, v in c._asdict().items()} for g, c in found.items()
        }
        content["runs"][name] = {
            "folder": str(runs[name]),
            "correlation": by_group.pop(name),
            "kinds": by_group,
            "history": history,
        }
    atomic_write_text(str(args.output.with_suffix(".json")), json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output} and {args.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
