"""The three routes out of an adapter under one function."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..doctor_norms import of_quantisation
from ..formats import UnreadableError
from .adapted import AdaptedBase
from .companions import base_folder
from .gguf_checkpoint import GgufCheckpoint, checkpoint_of, is_gguf
from .gguf_record import check_record, other_base
from .record import Record
from .routes import Fit, Run, exact, lora, merged
from .splitting import split
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
    names = _place(base), [_place(one) for one in named], command
    run = Run(adapted, Path(out), *names, _of_base(adapted), force, dry_run, progress)
    if route == "exact":
        return exact(run, torch.float16 if dtype is None else dtype, dequantize)
    if route == "merged":
        return merged(run, dtype)
    fit = Fit(rank, error, torch.float16 if dtype is None else dtype, to, calibration, covariance)
    return lora(run, fit)


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


def _place(named: str | os.PathLike[str]) -> str:
    """A folder by its absolute path: "models/llama" could be a name on the Hub, and is one from elsewhere."""
    return str(Path(named).absolute()) if Path(named).exists() else str(named)


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
