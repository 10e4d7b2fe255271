"""What is wrong with an adapter that loads without an error."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .convert import Report, read_as
from .formats import Adapter, Base, Module, UnreadableError, format_of, read_source
from .formats.source import CONFIG, Source
from .formats.torchtune import heads_of, interleaved

# mean |m / ||W0 + s B A|| - 1| of a module. Training moves it by less than a hundredth; a base that was quantised in
# training moves the norms of its rows by up to 2 %.
ANOTHER_BASE = 0.05
# The same where magnitudes are as they were initialised: fp32 sums differ by their order.
AS_INITIALISED = 1e-5


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that some tool would read wrongly.

    Attributes:
        name: Of the kind of finding.
        modules: The modules concerned; none if it concerns the whole.
        found: What was found, a sentence.
        mend: What to do, a sentence.
    """

    name: str
    modules: tuple[str, ...]
    found: str
    mend: str


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
    findings = [*_of_tensors(source), *_of_config(source, weights)]
    if any(finding.name == "not-finite" for finding in findings):
        return findings
    name = source_format or format_of(source)
    try:
        read = _read(source, name, weights, axis)
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


def _is_magnitude(key: str) -> bool:
    return bool(re.search(r"\.(lora_magnitude_vector|weight_m_wdecomp|dora_scale|magnitude|m)(\.weight)?$", key))


def _of_tensors(source: Source) -> Iterator[Finding]:
    bad = [key for key, t in source.tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        yield Finding(
            "not-finite", tuple(bad), "These tensors hold NaN or infinite values.",
            "Use an earlier checkpoint: training had diverged, or a row of W0 was zero and divided by.",
        )  # fmt: skip
    low = [
        key for key, t in source.tensors.items() if _is_magnitude(key) and t.dtype in (torch.bfloat16, torch.float16)
    ]
    if low:
        dtype = str(source.tensors[low[0]].dtype).removeprefix("torch.")
        yield Finding(
            "low-precision-magnitudes", tuple(low),
            f"These magnitudes are {dtype}, in which the change of a whole training is below one rounding step.",
            "Train with magnitudes in fp32 (dora_peft does), and save them so.",
        )  # fmt: skip
    flat = [key for key, t in source.tensors.items() if key.endswith(".dora_scale") and t.dim() == 1]
    if flat:
        yield Finding(
            "one-dimensional-scale", tuple(flat),
            "These scales have one dimension: on square layers readers take output rows for input columns.",
            "Write them anew with `dora-peft convert --to lycoris`, which keeps the second dimension.",
        )  # fmt: skip


def _of_config(source: Source, base: Base) -> Iterator[Finding]:
    config = source.config or {}
    stems: dict[str, set[str]] = {}
    for key in source.tensors:
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector|weight_m_wdecomp)(?:\.weight)?", key
        )
        if match:
            stems.setdefault(match[1], set()).add(match[2])
    if "peft_type" not in config or not stems:
        return
    with_m = [path for path, parts in stems.items() if parts - {"lora_A", "lora_B"}]
    without = tuple(path for path in stems if path not in with_m)
    says_dora = config.get("use_dora") or config.get("peft_type") == "DORA"
    if says_dora and without:
        yield Finding(
            "magnitudes-missing", without,
            f"{CONFIG} says DoRA, and {len(without)} of {len(stems)} modules have no magnitude: readers make them up.",
            "Use an intact checkpoint; the tool that exported this one dropped them.",
        )  # fmt: skip
    if with_m and not says_dora:
        yield Finding(
            "not-called-dora", tuple(with_m),
            f"These modules have magnitudes, and {CONFIG} does not say use_dora: readers ignore them.",
            f"Set use_dora to true in {CONFIG}.",
        )  # fmt: skip
    yield from _of_ranks(source, config, stems)
    yield from _of_names(config, set(stems), base)


def _of_ranks(source: Source, config: Mapping[str, object], stems: Mapping[str, object]) -> Iterator[Finding]:
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        return
    other = []
    for path in stems:
        wanted = patterns.get(get_pattern_key(list(patterns), path), config.get("r"))
        for prefix in ("base_model.model.", ""):
            factor = source.tensors.get(f"{prefix}{path}.lora_A.weight")
            if factor is not None and len(factor) != wanted:
                other.append(path)
    if other:
        yield Finding(
            "other-ranks", tuple(other), f"These modules have another rank than {CONFIG} says, so that s is wrong.",
            "Restore the config that was saved with the tensors.",
        )  # fmt: skip


def _of_names(config: Mapping[str, object], adapted: set[str], base: Base) -> Iterator[Finding]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        pattern = targets

        def named(path: str) -> bool:
            return re.fullmatch(pattern, path) is not None
    elif isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        names = [str(name) for name in targets]

        def named(path: str) -> bool:
            return any(path == name or path.endswith(f".{name}") for name in names)
    else:
        return
    if targets == "all-linear":
        return
    unnamed = tuple(sorted(path for path in adapted if not named(path)))
    if unnamed:
        yield Finding(
            "not-named", unnamed, f"These modules have tensors, and target_modules in {CONFIG} does not name them: "
            "readers leave them out.", "Restore the config that was saved with the tensors.",
        )  # fmt: skip
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    absent = tuple(path for path in base.paths() if named(path) and path not in adapted)
    if absent and not narrowed:
        yield Finding(
            "named-without-tensors", absent, f"target_modules in {CONFIG} names these modules, and they have no "
            "tensors: readers leave them as they are, or make factors up.", "Use an intact checkpoint.",
        )  # fmt: skip


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
        moved = tuple(n.path for n in still if bool(n.module.lora_B.any()))
        yield Finding(
            "magnitudes-never-moved" if moved else "untrained", moved or tuple(n.path for n in still),
            "All magnitudes equal ||W0||" + (", while B was trained." if moved else ", and B is zero."),
            "Train with magnitudes in fp32 and in the optimizer (dora_peft.param_groups)." if moved
            else "This is the adapter before training: use a later checkpoint.",
        )  # fmt: skip


def _as_initialised(n: _Norms) -> bool:
    own = n.module.magnitude
    assert own is not None
    rounding = 0.0 if own.dtype in (torch.float32, torch.float64) else torch.finfo(own.dtype).eps
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
