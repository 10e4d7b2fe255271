"""The route `lora`: a DoRA as the nearest plain LoRA of one rank, for servers that know no other.

lowrank.py the approximation of one module, plain.py the folder, gguf.py llama.cpp's file, calibration.py how
large inputs are, comparison.py what a text says of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from ..formats import Files, UnreadableError, write_files
from ..formats.files import check_target
from ..formats.source import CONFIG
from .gguf import architecture, check_gguf, write_gguf
from .lowrank import Change, LowRank, Weights, approximate, measured_errors
from .plain import RANKS, Factors, check_rank, plain_files, plain_modules
from .record import NAME

TARGETS = ("peft", "gguf")
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class ModuleReport:
    """How one module came out.

    Attributes:
        path: Its path in the base model.
        rank: Of its factors, at most the adapter's; less if the matrix has less.
        update: ||dW||_F.
        scale_share: ||(c - 1) W0||_F / ||dW||_F, the part of dW that no low rank holds; the two parts need not add up.
        error: ||dW - B A||_F / ||dW||_F of the factors as written.
        weighted_error: The same of (dW - B A) D, before rounding; None if the fit had no weights.
    """

    path: str
    rank: int
    update: float
    scale_share: float
    error: float
    weighted_error: float | None = None


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote.

    Attributes:
        rank: Of all modules.
        dtype: Of the tensors.
        update, scale_share, error, weighted_error: As of a module, over all of them together.
        errors: The error at each rank that was measured.
        modules: One by one.
        factors: As written, without the padding; for `comparison.compare`.
        files: What was written.
        notes: What a reader should know, a sentence each.
    """

    rank: int
    dtype: torch.dtype
    update: float
    scale_share: float
    error: float
    weighted_error: float | None
    errors: dict[int, float]
    modules: list[ModuleReport]
    factors: dict[str, Factors]
    files: list[Path]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fit:
    """One module's approximation as it is kept until the rank is known: norms squared, and factors rounded."""

    factors: Factors
    update: float
    scale: float
    errors: dict[int, float]
    weighted: dict[int, float] | None
    weighted_update: float


def export_lora(
    changes: Iterable[Change],
    out: str | os.PathLike[str],
    *,
    base_name: str,
    rank: int | None = None,
    error: float | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float16,
    to: str = "peft",
    config: Mapping[str, object] | None = None,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
    force: bool = False,
    describe: Callable[[LoraExport], Mapping[str, object]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoraExport:
    """Write the plain LoRA of one rank that is nearest to an adapter.

    Args:
        changes: What the adapter changes, module by module; each is read before the next is asked for.
        out: The folder to write; the file, for llama.cpp.
        base_name: The base's folder or name on the Hub, which PEFT loads it by.
        rank: One of `RANKS`; or
        error: Take the smallest of them with ||dW - B A||_F <= error ||dW||_F over all modules, unweighted.
        weights: The mean square of each input feature [in], or the second moments [in, in], by path; None for a module
            fits it without. A mapping's `get`, or `SecondMoments`.
        dtype: Of the tensors; fp32 if a value overflows it.
        to: "peft" for the folder that PEFT, vLLM and SGLang read; "gguf" for llama.cpp's file.
        config: The base's config.json, for "gguf".
        fan_in_fan_out, task_type: Of the folder's config, see `plain_files`.
        force: Replace what is at `out`.
        describe: Called with what will be written, before it is: the folder's dora_export.json.
        progress: Called with the path of each module.

    Raises:
        UnreadableError: No rank reaches the error (the value reached is named), there are no changes, one is not
            finite, or llama.cpp has no place for one.
        FileExistsError, ValueError, NotSavedError: See `write_files` and `write_gguf`.
    """
    ranks = _ranks(rank, error)
    _check_place(out, to, config, force)
    fits: dict[str, _Fit] = {}
    for change in changes:
        if progress is not None:
            progress(change.path)
        fits[change.path] = _fit(change, ranks, None if weights is None else weights(change.path), dtype)
    if not fits:
        raise UnreadableError("The adapter changes no module, so that there is no LoRA to write.")
    errors = {one: _error(fits, one) for one in ranks}
    chosen = ranks[-1] if error is None else _reaching(errors, error, dtype)
    factors = {path: fit.factors.cut(chosen) for path, fit in fits.items()}
    modules, notes = plain_modules(factors, chosen)
    done = LoraExport(
        rank=chosen,
        dtype=next(iter(modules.values())).lora_A.dtype,
        update=sqrt(sum(fit.update for fit in fits.values())),
        scale_share=_ratio(fits, lambda fit: fit.scale),
        error=errors[chosen],
        weighted_error=_weighted_ratio(fits, chosen),
        errors=errors,
        modules=[_report(path, fit, chosen) for path, fit in fits.items()],
        factors=factors,
        files=[],
        notes=notes,
    )
    said = {} if describe is None else {NAME: dict(describe(done))}
    if to == "gguf":
        done.files.append(write_gguf(modules, config or {}, out, name=Path(base_name).name, force=force))
    else:
        made = plain_files(modules, base_name, fan_in_fan_out=fan_in_fan_out, task_type=task_type)
        done.files.extend(write_files(replace(made, json={**made.json, **said}), out, force=force))
    return done


def check_request(
    out: str | os.PathLike[str],
    rank: int | None,
    error: float | None,
    to: str,
    config: Mapping[str, object] | None,
    force: bool,
) -> None:
    """Refuse what `export_lora` would refuse before it computes; arguments and errors are its own."""
    _ranks(rank, error)
    _check_place(out, to, config, force)


def _ranks(rank: int | None, error: float | None) -> tuple[int, ...]:
    """Those whose error is measured."""
    if (rank is None) == (error is None):
        raise UnreadableError("--as lora takes --rank or --error: expected one of them.")
    if rank is not None:
        check_rank(rank)
        return (rank,)
    if error is None or not 0 < error < 1:
        raise UnreadableError(f"--error {error}: expected a part of the update, between 0 and 1.")
    return RANKS


def _check_place(out: str | os.PathLike[str], to: str, config: Mapping[str, object] | None, force: bool) -> None:
    """Refuse what could not be written before anything is computed."""
    if to not in TARGETS:
        raise UnreadableError(f"--to {to}: expected one of {', '.join(TARGETS)}.")
    if to == "peft":
        check_target(Files("adapter_model.safetensors", {}, json={CONFIG: {}}), out, force=force)
        return
    if config is None:
        raise UnreadableError("--to gguf names tensors by the base's config.json, and there is none.")
    architecture(config)
    check_gguf(out, force=force)


def _fit(change: Change, ranks: tuple[int, ...], weight: Tensor | None, dtype: torch.dtype) -> _Fit:
    found = approximate(change, ranks[-1], weight)
    factors = _factors(change, found, dtype)
    errors = measured_errors(change, factors.lora_A, factors.lora_B, ranks)
    weighted = None if weight is None else {one: found.weighted_error(one) ** 2 for one in ranks}
    return _Fit(factors, found.norm**2, found.scale_norm**2, errors, weighted, found.weighted_norm**2)


def _factors(change: Change, found: LowRank, dtype: torch.dtype) -> Factors:
    """The components up to the last that is more than fp32's rounding of dW, rounded, on the CPU."""
    live = int((found.energies > (EPSILON * found.norm) ** 2).nonzero().max()) + 1 if found.norm else 0
    own = Factors(found.lora_A[:live], found.lora_B[:, :live], change.embedding, change.kernel).rounded(dtype)
    return Factors(own.lora_A.cpu(), own.lora_B.cpu(), own.embedding, own.kernel)


def _ratio(fits: Mapping[str, _Fit], part: Callable[[_Fit], float]) -> float:
    """The norm of a part of all updates together to that of the updates; 0 if there is none."""
    update = sum(fit.update for fit in fits.values())
    return sqrt(sum(map(part, fits.values())) / update) if update else 0.0


def _error(fits: Mapping[str, _Fit], rank: int) -> float:
    return _ratio(fits, lambda fit: fit.errors[rank])


def _weighted_ratio(fits: Mapping[str, _Fit], rank: int) -> float | None:
    known = [fit for fit in fits.values() if fit.weighted is not None]
    if not known:
        return None
    update = sum(fit.weighted_update for fit in known)
    return sqrt(sum((fit.weighted or {})[rank] for fit in known) / update) if update else 0.0


def _reaching(errors: Mapping[int, float], error: float, dtype: torch.dtype) -> int:
    """The smallest rank with at most this error.

    Raises:
        UnreadableError: There is none.
    """
    for rank, reached in errors.items():
        if reached <= error:
            return rank
    last = max(errors)
    finer = "" if dtype == torch.float32 else "choose --dtype fp32, "
    raise UnreadableError(
        f"--error {error:g} cannot be reached: at rank {last}, the largest that vLLM takes, error / update is "
        f"{errors[last]:.4g}. Allow at least that, {finer}or export with --as exact or merged."
    )


def _report(path: str, fit: _Fit, rank: int) -> ModuleReport:
    one = {path: fit}
    return ModuleReport(
        path=path,
        rank=min(rank, len(fit.factors.lora_A)),
        update=sqrt(fit.update),
        scale_share=_ratio(one, lambda own: own.scale),
        error=_error(one, rank),
        weighted_error=_weighted_ratio(one, rank),
    )
