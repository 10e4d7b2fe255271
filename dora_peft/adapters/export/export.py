"""The three routes out of an adapter under one function."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..doctor_norms import of_quantisation
from ..formats import UnreadableError
from .adapted import AdaptedBase
from .changes import changes
from .companions import base_folder
from .exact import Exact, export_exact, task_of
from .exact_gguf import export_exact_gguf
from .gguf_checkpoint import GgufCheckpoint, checkpoint_of, is_gguf
from .gguf_record import check_record, other_base
from .lora import LoraExport, export_lora
from .merged import export_merged
from .pieces import check_all
from .record import Record, read_record
from .splitting import Loss, loss_of, split
from .text import text_for
from .writing import Report

ROUTES = ("exact", "lora", "merged")


def export(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    route: str,
    *,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    error: float | None = None,
    to: str = "peft",
    calibration: str | os.PathLike[str] | None = None,
    covariance: bool = False,
    base_quantization: str | None = None,
    dequantize: bool = False,
    device: torch.device | str = "cpu",
    force: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    command: str | None = None,
    progress: Report | None = None,
) -> Record:
    """Write what servers that do not know DoRA take: W' = c (W0 + s B A) by one of three routes.

    Args:
        adapters: Folders, files or names on the Hub, in any format that `convert` reads, in the order in which they are
            active.
        base: A folder of safetensors files, or "owner/name" or "owner/name@revision" on the Hub; or a .gguf, whose
            "exact" export is one as well.
        out: The folder to write; with `to` "gguf" the file.
        route: "exact", a base with rows c W0 in `out`/base and a plain LoRA c s B A in `out`/adapter: exact up to
            rounding of W0; "lora", the nearest plain LoRA over the base as it is; "merged", a base with weights W'.
        dtype: Of what is written: fp16 if None, but for "merged" that of the base. fp32 if fp16 overflows.
        rank, error: Of "lora": one of vLLM's ranks, or the largest ||dW - B A|| / ||dW|| over all modules.
        to: Of "lora": "peft" for a folder, "gguf" for llama.cpp's file.
        calibration: Of "lora": a file of texts, by whose inputs the fit is weighted and the result compared.
        covariance: Weight by the whole second moments of the inputs, one layer at a time.
        base_quantization: How the base was quantised in training, "nf4", "fp4", "int8" or "none"; what the folders say
            if None. A .gguf is taken as it is.
        dequantize: Of "exact": write a quantised base in floating point, whose codes stay otherwise.
        device: Where it is computed.
        force: Replace an export at `out`.
        dry_run: Write nothing.
        allow_pickle: Also read adapters of torch.save, their tensors alone.
        command: What a user typed, for the record.
        progress: Called with what is being read or written.

    Returns:
        What was written, with its errors; it is in dora_export.json as well.

    Raises:
        UnreadableError: An adapter cannot be read or does not fit the base, or the route cannot hold it.
        FileExistsError: Something is at `out`, and `force` is not set or it is something else.
        OSError: The system cannot write.
    """
    if route not in ROUTES:
        raise UnreadableError(f"--as {route}: expected one of {', '.join(ROUTES)}.")
    if route != "lora" and (rank, error, calibration, to) != (None, None, None, "peft"):
        raise UnreadableError(f"--rank, --error, --calibration and --to belong to --as lora, and this is {route}.")
    if covariance and calibration is None:
        raise UnreadableError("--covariance says how to weight by a text: it needs --calibration TEXT.")
    if dequantize and route != "exact":
        raise UnreadableError(f"--dequantize belongs to --as exact, and this is {route}, which writes floats anyway.")
    if is_gguf(base):
        _check_over_gguf(route, base, dequantize)
    named = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    if not named:
        raise UnreadableError("There is no adapter to export: expected at least one.")
    adapted = AdaptedBase(
        checkpoint_of(base if is_gguf(base) else base_folder(base)), named, device=device, allow_pickle=allow_pickle,
        base_quantization=base_quantization,
    )  # fmt: skip
    if isinstance(adapted.checkpoint, GgufCheckpoint):
        check_record(adapted)
    run = _Run(adapted, Path(out), _place(base), [_place(one) for one in named], command, force, dry_run, progress)
    if route == "exact":
        return _exact(run, torch.float16 if dtype is None else dtype, dequantize)
    if route == "merged":
        return _merged(run, dtype)
    fit = _Fit(rank, error, torch.float16 if dtype is None else dtype, to, calibration, covariance)
    return _lora(run, fit)


@dataclass(frozen=True)
class _Run:
    """What all routes are told."""

    adapted: AdaptedBase
    out: Path
    base: str
    adapters: list[str]
    command: str | None
    force: bool
    dry_run: bool
    progress: Report | None

    def record(
        self,
        route: str,
        dtype: torch.dtype,
        statement: str,
        totals: Mapping[str, float],
        modules: Mapping[str, Mapping[str, float]],
        notes: Sequence[str],
    ) -> Record:
        name = str(dtype).removeprefix("torch.")
        of_base = _of_base(self.adapted)
        return Record(
            route, name, self.base, self.adapters, statement, totals, modules, [*of_base, *notes], self.command
        )


@dataclass(frozen=True)
class _Fit:
    """What the route `lora` is told."""

    rank: int | None
    error: float | None
    dtype: torch.dtype
    to: str
    calibration: str | os.PathLike[str] | None
    covariance: bool


def _check_over_gguf(route: str, base: str | os.PathLike[str], dequantize: bool) -> None:
    """Refuse what a .gguf is no base for before it is read."""
    if route == "merged":
        raise UnreadableError(
            f"--as merged of '{base}' would have to quantise W' again, which loses most of an update: name the base in "
            "safetensors, or export with --as exact or lora."
        )
    if dequantize:
        raise UnreadableError(
            f"--dequantize writes safetensors, and '{base}' is a .gguf: name the base in safetensors, or leave it out."
        )


def _exact(run: _Run, dtype: torch.dtype, dequantize: bool) -> Record:
    if isinstance(run.adapted.checkpoint, GgufCheckpoint):
        return _exact_gguf(run, dtype)

    def record(done: Exact) -> Record:
        statement = f"exact up to rounding of W0 to {_name(done.dtype)}"
        totals, modules = _numbers(done.losses)
        return run.record("exact", done.dtype, statement, {**totals, "rank": done.rank}, modules, done.notes)

    done = export_exact(
        run.adapted, run.out, dtype=dtype, dequantize=dequantize, force=run.force, dry_run=run.dry_run,
        finish=lambda known, folder: record(known).write(folder), progress=run.progress,
    )  # fmt: skip
    return record(done)


def _exact_gguf(run: _Run, dtype: torch.dtype) -> Record:
    def record(done: Exact) -> Record:
        statement = "exact up to rounding of W0: its codes stay, and scales times c are rounded to the file's types"
        return run.record("exact", done.dtype, statement, *_numbers(done.losses), done.notes)

    done = export_exact_gguf(
        run.adapted, run.out, dtype=dtype, force=run.force, dry_run=run.dry_run,
        finish=lambda known, folder: record(known).write(folder), progress=run.progress,
    )  # fmt: skip
    return record(done)


def _merged(run: _Run, dtype: torch.dtype | None) -> Record:
    adapted = run.adapted
    check_all(adapted)
    losses: dict[str, Loss] = {}
    stored = adapted.dtype_of(next(iter(adapted.layers)))
    to = stored if dtype is None else dtype

    def weight(path: str) -> Tensor:
        served, losses[path] = _merged_with_loss(adapted, path, dtype)
        return served

    def record(notes: Sequence[str]) -> Record:
        statement = f"exact up to rounding of W' to {_name(to)}, as merge_and_unload rounds it"
        for path in adapted.layers:
            # of files that an earlier run has finished, and of a dry run
            if path not in losses:
                if run.progress is not None:
                    run.progress(path)
                weight(path)
        in_order = {path: losses[path] for path in adapted.layers}
        return run.record("merged", to, statement, *_numbers(in_order), notes)

    if run.dry_run:
        return record([])
    done = export_merged(
        adapted, run.out, dtype=dtype, weight=weight, force=run.force, progress=run.progress,
        finish=lambda folder, notes: [record(notes).write(folder)],
    )  # fmt: skip
    return record(done.notes)


def _merged_with_loss(adapted: AdaptedBase, path: str, dtype: torch.dtype | None) -> tuple[Tensor, Loss]:
    """W' of a module, and what rounding it cost."""
    with adapted.at_hand(path) as layer:
        parts = adapted.parts(path, layer)
        if dtype in (None, layer.get_base_layer().get_parameter("weight").dtype):
            served = adapted.merge(path, layer).to(dtype or adapted.dtype_of(path))
            return served, loss_of(layer, parts, served)
    # merged in another dtype, and compared with W' of W0 as it is stored
    served = adapted.merged(path, dtype)
    with adapted.at_hand(path) as layer:
        return served, loss_of(layer, parts, served)


def _lora(run: _Run, fit: _Fit) -> Record:
    adapted = run.adapted
    check_all(adapted)
    _check_plain(adapted)
    if run.force and fit.to == "peft" and not run.dry_run:
        _check_replaced(run.out)
    text = None if fit.calibration is None else text_for(adapted, fit.calibration)
    weights = None if text is None else text.weights(list(adapted.layers), fit.covariance)
    turned = any(isinstance(layer.get_base_layer(), Conv1D) for layer in adapted.layers.values())
    records: list[Record] = []

    def describe(done: LoraExport) -> Mapping[str, object]:
        records.append(_lora_record(run, done, {} if text is None else vars(text.compare(done.factors))))
        return vars(records[0])

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / run.out.name if run.dry_run else run.out
        export_lora(
            changes(adapted), out, base_name=run.base, rank=fit.rank, error=fit.error, weights=weights,
            dtype=fit.dtype, to=fit.to, config=adapted.checkpoint.config, fan_in_fan_out=turned,
            task_type=task_of(adapted), force=run.force, describe=describe, progress=run.progress,
        )  # fmt: skip
    return records[0]


def _check_plain(adapted: AdaptedBase) -> None:
    """That nothing was trained that a plain LoRA over the base's own files does not hold."""
    brought = adapted.given()
    others = [*(name for name in adapted.trained() if name not in brought), *adapted.replaced()]
    if others:
        raise UnreadableError(
            f"The adapter also trained '{others[0]}' ({len(others)} such parameters), and a plain LoRA holds "
            "factors alone. Export with --as exact or merged."
        )


def _check_replaced(out: Path) -> None:
    """That `force` replaces a plain LoRA of ours: an adapter that was trained cannot be made again from it."""
    entries = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    found = read_record(out) if out.is_dir() else None
    if entries and (found is None or found.route != "lora"):
        raise FileExistsError(
            f"'{out}' is not what --as lora wrote: --force replaces such a folder alone. Choose another name."
        )


def _lora_record(run: _Run, done: LoraExport, of_text: Mapping[str, float]) -> Record:
    totals = {"rank": done.rank, "error_over_update": done.error, "scale_share": done.scale_share, **of_text}
    modules = {
        one.path: {
            "error_over_update": one.error,
            "scale_share": one.scale_share,
            "rank": one.rank,
            "update": one.update,
        }
        for one in done.modules
    }
    statement = (
        f"approximate: the nearest plain LoRA of rank {done.rank}; the part (c - 1) W0, which no low rank holds, is "
        f"{done.scale_share:.3g} of the update"
    )
    notes = list(done.notes)
    if run.adapted.quantised is not None:
        notes.append("serve it over that quantised base: over the one in floating point it is another adapter")
    return run.record("lora", done.dtype, statement, totals, modules, notes)


def _place(named: str | os.PathLike[str]) -> str:
    """A folder by its absolute path: "models/llama" could be a name on the Hub, and is one from elsewhere."""
    return str(Path(named).absolute()) if Path(named).exists() else str(named)


def _numbers(losses: Mapping[str, Loss]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Totals, and each module's."""
    error, update = (sqrt(sum(getattr(one, name) ** 2 for one in losses.values())) for name in ("error", "update"))
    rows, lost = (sum(getattr(one, name) for one in losses.values()) for name in ("rows", "lost"))
    totals = {"error_over_update": error / update if update else 0.0, "share_lost": lost / rows if rows else 0.0}
    modules = {
        path: {"error_over_update": one.error_over_update, "share_lost": one.share_lost, "update": one.update}
        for path, one in losses.items()
    }
    return totals, modules


def _of_base(adapted: AdaptedBase) -> list[str]:
    """What has to be said of the base."""
    if adapted.quantised is not None:
        return ["W0 is the base as bitsandbytes quantised it in training, as the adapter's folder or the caller says"]
    other = other_base(adapted)
    if not adapted.unrecorded and other is None:
        told = () if adapted.told or not adapted.coded else adapted.sources
        return [finding.found for source in told for finding in of_quantisation(source, adapted.base)]
    total, count = 0.0, 0
    for path in adapted.layers:
        with adapted.at_hand(path) as layer:
            off = (split(adapted.parts(path, layer)).scale - 1).abs()
            total, count = total + off.sum().item(), count + len(off)
    found = f"magnitudes are {total / count:.2%} off the norms of this one on average"
    if other is not None:
        return [f"{other}: {found}"]
    return [
        f"the adapter's folder does not say how its base was quantised in training: {found} (NF4 moves norms by up to "
        "1.9 %); see --base-quantization"
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
