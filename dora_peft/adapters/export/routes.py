"""Each route out of an adapter: what is written, and the record of it."""

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

from ..formats import UnreadableError
from .adapted import AdaptedBase
from .changes import changes
from .exact import Exact, export_exact, task_of
from .exact_gguf import export_exact_gguf
from .gguf_checkpoint import GgufCheckpoint
from .lora import LoraExport, check_request, export_lora
from .merged import export_merged
from .pieces import check_all
from .record import Record, read_record
from .splitting import Loss, loss_of
from .text import text_for
from .writing import Report


@dataclass(frozen=True)
class Run:
    """What all routes are told: names for the record, notes on the base, and how to run."""

    adapted: AdaptedBase
    out: Path
    base: str
    adapters: list[str]
    command: str | None
    of_base: Sequence[str]
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
        notes = [*self.of_base, *notes]
        return Record(route, name, self.base, self.adapters, statement, totals, modules, notes, self.command)


@dataclass(frozen=True)
class Fit:
    """What the route `lora` is told."""

    rank: int | None
    error: float | None
    dtype: torch.dtype
    to: str
    calibration: str | os.PathLike[str] | None
    covariance: bool


def exact(run: Run, dtype: torch.dtype, dequantize: bool) -> Record:
    """Rows c W0 and a plain LoRA, or the same in files of llama.cpp's over a .gguf; errors are those of `export`."""
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


def _exact_gguf(run: Run, dtype: torch.dtype) -> Record:
    def record(done: Exact) -> Record:
        statement = "exact up to rounding of W0: its codes stay, and scales times c are rounded to the file's types"
        return run.record("exact", done.dtype, statement, *_numbers(done.losses), done.notes)

    done = export_exact_gguf(
        run.adapted, run.out, dtype=dtype, force=run.force, dry_run=run.dry_run,
        finish=lambda known, folder: record(known).write(folder), progress=run.progress,
    )  # fmt: skip
    return record(done)


def merged(run: Run, dtype: torch.dtype | None) -> Record:
    """W' in the base's files; errors are those of `export`."""
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


def lora(run: Run, fit: Fit) -> Record:
    """The nearest plain LoRA; errors are those of `export`."""
    adapted = run.adapted
    check_all(adapted)
    _check_plain(adapted)
    if run.force and fit.to == "peft" and not run.dry_run:
        _check_replaced(run.out)
    if not run.dry_run:
        # a text takes minutes
        check_request(run.out, fit.rank, fit.error, fit.to, adapted.checkpoint.config, run.force)
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


def _lora_record(run: Run, done: LoraExport, of_text: Mapping[str, float]) -> Record:
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
