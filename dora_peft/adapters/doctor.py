"""What is wrong with an adapter that loads without an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .convert import Report, read_as
from .doctor_files import Finding, of_config, of_magnitudes, of_numbers, of_patterns, of_tensors
from .formats import Adapter, Base, Module, UnreadableError, format_of, read_source
from .formats.source import Source
from .formats.torchtune import heads_of, interleaved

# mean |m / ||W0 + s B A|| - 1| of a module. Training moves it by less than a hundredth; a base that was quantised in
# training moves the norms of its rows by up to 2 %.
ANOTHER_BASE = 0.05
# The same where magnitudes are as they were initialised: fp32 sums differ by their order.
AS_INITIALISED = 1e-5


@dataclass(frozen=True)
class _Norms:
    """Of one module: m, ||W0|| and ||W0 + s B A|| per output row, all [out] in fp64."""

    path: str
    module: Module
    magnitude: Tensor
    before: Tensor
    composed: Tensor

    def distance(self, magnitude: Tensor | None = None) -> float:
        """mean |m / ||W0 + s B A|| - 1|, of rows that are not zero."""
        m = self.magnitude if magnitude is None else magnitude
        live = self.composed > 0
        return (m[live] / self.composed[live] - 1).abs().mean().item() if bool(live.any()) else 0.0


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
    try:
        read = _read(source, name, weights, axis)
        if not any(finding.name == "magnitudes-missing" for finding in findings):
            findings += of_magnitudes(read, source)
        weights.check(read)
    except UnreadableError as error:
        return [*findings, Finding("unreadable", (), str(error), "Mend what the sentence names, and look again.")]
    norms = []
    for path, module in read.modules.items():
        if module.magnitude is not None:
            before, composed = weights.row_norms(path, module, with_change=False), weights.row_norms(path, module)
            norms.append(_Norms(path, module, module.magnitude.double().cpu(), before, composed))
    return [*findings, *_of_norms(norms, weights), *_of_quantisation(source, weights)]


def _read(source: Source, name: str, base: Base, axis: str | None) -> Adapter:
    """The adapter; a scale whose axis the file does not say is taken for one of output rows, and compared later."""
    if name not in ("lycoris", "onetrainer"):
        return read_as(source, name, base)
    try:
        return read_as(source, name, base, axis=axis)
    except UnreadableError:
        return read_as(source, name, base, axis="output")


def _of_norms(norms: list[_Norms], base: Base) -> Iterator[Finding]:
    zero = tuple(n.path for n in norms if bool((n.composed == 0).any()))
    if zero:
        yield Finding(
            "zero-rows", zero, "Rows of W0 + s B A are zero here: plain PEFT divides by their norm and gives NaN.",
            "Load and save the adapter with dora_peft, which writes a tiny entry into B there.",
        )  # fmt: skip
    kinds: dict[str, list[tuple[str, float]]] = {}
    for n in norms:
        distance = n.distance()
        if distance > ANOTHER_BASE:
            kinds.setdefault(_kind(n, base), []).append((n.path, distance))
    sentences = {
        "another-base": (
            "Magnitudes are far from the norms of this base (one that was quantised in training differs by up to 2 %)",
            "Name the base that the adapter was trained on.",
        ),
        "normalised-magnitudes": (
            "Magnitudes are near 1, as TensorRT-LLM's normaliser writes m / ||W0 + s B A||",
            "Convert with --from trtllm.",
        ),
        "permuted-rows": (
            "Magnitudes fit the norms of this base in torchtune's order of rows only",
            "Convert with --from torchtune, whose exporter leaves magnitudes in its own order.",
        ),
        "transposed-scale": (
            "Magnitudes fit the norms of this base per input column, not per output row",
            "Convert with --axis input --refit from the file as it was made.",
        ),
    }
    for name, found in kinds.items():
        what, mend = sentences[name]
        mean = sum(distance for _, distance in found) / len(found)
        yield Finding(name, tuple(path for path, _ in found), f"{what}: mean |m / norm - 1| is {mean:.3g}.", mend)
    still = [n for n in norms if _as_initialised(n)]
    if norms and len(still) == len(norms):
        moved = tuple(n.path for n in still if bool((n.module.lora_B != 0).any()))
        yield Finding(
            "magnitudes-never-moved" if moved else "untrained", moved or tuple(n.path for n in still),
            "All magnitudes equal ||W0||" + (", while B was trained." if moved else ", and B is zero."),
            "Train with magnitudes in fp32 and in the optimizer (dora_peft.param_groups)." if moved
            else "This is the adapter before training: use a later checkpoint.",
        )  # fmt: skip


def _as_initialised(n: _Norms) -> bool:
    own = n.module.magnitude
    assert own is not None
    rounding = torch.finfo(own.dtype).eps if own.dtype in (torch.bfloat16, torch.float16) else 0.0
    return bool(((n.magnitude - n.before).abs() <= (AS_INITIALISED + rounding) * n.before).all())


def _kind(n: _Norms, base: Base) -> str:
    """Why magnitudes are far from the norms."""
    live = n.composed > 0
    if (n.magnitude[live] - 1).abs().mean() < ANOTHER_BASE:
        return "normalised-magnitudes"
    heads = heads_of(n.path, base, n.module.out_features)
    if heads is not None:
        orders = (interleaved(n.magnitude, heads, to_torchtune=way) for way in (True, False))
        if min(n.distance(order) for order in orders) <= ANOTHER_BASE:
            return "permuted-rows"
    if n.module.out_features == n.module.in_features:
        columns = base.column_norms(n.path, n.module)
        if (n.magnitude / columns.clamp(min=1e-300) - 1).abs().mean() <= ANOTHER_BASE:
            return "transposed-scale"
    return "another-base"


def _of_quantisation(source: Source, base: Base) -> Iterator[Finding]:
    """A base that is quantised, and a folder that does not say so."""
    kind = base.config.get("quantization_config")
    mapping = (source.config or {}).get("auto_mapping")
    own = mapping.get("dora_peft") if isinstance(mapping, dict) else None
    if kind and not (isinstance(own, dict) and own.get("base_quantization")):
        method = kind.get("quant_method") if isinstance(kind, dict) else kind
        yield Finding(
            "quantisation-unrecorded", (), f"The base is quantised ({method}), and the folder does not say by what it "
            "was trained over: over another kind the norms differ by up to 2 %.",
            "Save the adapter again over the base that it was trained on; dora_peft records the kind.",
        )  # fmt: skip
