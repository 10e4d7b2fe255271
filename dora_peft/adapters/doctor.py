"""What is wrong with an adapter that loads without an error."""

from __future__ import annotations

import os

import torch
from torch import nn

from .convert import CHANGES_BASE, SCALES, Report, read_as
from .doctor_files import Finding, of_config, of_magnitudes, of_numbers, of_patterns, of_tensors, without_input_scales
from .doctor_norms import Norms, norms_of, of_norms, of_quantisation, quantised, told_axis
from .export.fingerprint import KEY, other_weights
from .formats import Adapter, Base, UnreadableError, format_of, read_source
from .formats.source import Source

_CHANGES = (
    "The adapter was initialised by {}, which changes the base's weights whenever it is loaded: tools that do not know "
    "it read another adapter, and its magnitudes cannot be compared here.",
    "Save it with path_initial_model_for_weight_conversion.",
)

_NOT_ITS_BASE = (
    "The adapter is half of an exact export, and these weights of the base are not the rows c W0 that were made for "
    "it: over others, or in another dtype, it is another adapter.",
    "Name the folder `base` that was written with it.",
)


def doctor(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | nn.Module,
    *,
    source_format: str | None = None,
    device: torch.device | str = "cpu",
    axis: str | None = None,
    allow_pickle: bool = False,
    progress: Report | None = None,
) -> list[Finding]:
    """Look for every silent failure that is known.

    Args:
        adapter, base, source_format, device, axis, allow_pickle, progress: As for `convert`.

    Returns:
        The findings; none if the adapter is well.

    Raises:
        UnreadableError: The files cannot be read at all.
    """
    source = read_source(adapter, allow_pickle=allow_pickle)
    weights = Base(base, device, progress)
    # without a finite number or a usable expression nobody knows what else is meant
    stopping = [*of_numbers(source), *of_patterns(source)]
    findings = [*of_tensors(source), *stopping]
    if not stopping:
        findings += of_config(source, weights)
    if stopping or any(finding.name == "not-finite" for finding in findings):
        return findings
    name = source_format or format_of(source)
    init = (source.config or {}).get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        # the norms that m belongs to are those of weights that are in no file
        return [*findings, Finding("changes-base", (), *(sentence.format(init[:20]) for sentence in _CHANGES))]
    norms: list[Norms] = []
    unreadable: list[Finding] = []
    exported = KEY in source.metadata
    try:
        read = _read(source, name, weights, axis)
        if not exported and not any(finding.name == "magnitudes-missing" for finding in findings):
            findings += of_magnitudes(read, source)
        weights.check(read)
        if exported:
            # a plain LoRA over a base that was made for it
            others = tuple(other_weights(source.metadata, read, weights))
            findings += [Finding("not-its-base", others, *_NOT_ITS_BASE)] if others else []
        for path, module in read.modules.items():
            if module.magnitude is not None:
                norms.append(norms_of(path, module, module.magnitude, weights))
    except UnreadableError as error:
        unreadable.append(_unreadable(error, weights))
    flat = norms or _of_flat_scales(source, name, weights)
    findings = [told_axis(one, flat, source) if one.name == "one-dimensional-scale" else one for one in findings]
    # weights that cannot be read may be quantised, though no config says so
    told = not exported and (quantised(weights) or not unreadable)
    quantisation = of_quantisation(source, weights) if told else ()
    return [*findings, *of_norms(norms), *quantisation, *unreadable]


def _of_flat_scales(source: Source, name: str, base: Base) -> list[Norms]:
    """The norms of what has a scale of one dimension, in a file that also has those of input columns for certain."""
    kept = without_input_scales(source)
    if len(kept.tensors) == len(source.tensors):
        return []
    try:
        modules = _read(kept, name, base, "output").modules
        return [norms_of(path, one, one.magnitude, base) for path, one in modules.items() if one.magnitude is not None]
    except UnreadableError:
        # the finding about the whole file says why
        return []


def _unreadable(error: UnreadableError, base: Base) -> Finding:
    mend = "Mend what the sentence names, and look again."
    if quantised(base) or "is quantised" in str(error):
        mend = "Name the base as it was before quantisation, or pass the loaded model to dora_peft.adapters.doctor."
    return Finding("unreadable", (), str(error), mend)


def _read(source: Source, name: str, base: Base, axis: str | None) -> Adapter:
    """The adapter; a scale whose axis the file does not say is taken for one of output rows, and compared later."""
    if name not in SCALES:
        return read_as(source, name, base)
    try:
        return read_as(source, name, base, axis=axis)
    except UnreadableError:
        return read_as(source, name, base, axis="output")
