"""What `doctor` finds in an adapter's tensors and config as they are in the files, before they are read as a format."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from .doctor_patterns import PatternError, is_plain, matching
from .formats import Adapter, Base, mlx
from .formats.peft_keys import DIFFUSERS
from .formats.source import CONFIG, Source

_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
_PEFT_KEY = re.compile(
    rf"(?:base_model\.model\.)?(.+)\.({'|'.join(_FACTORS)}|lora_magnitude_vector|weight_m_wdecomp)(?:\.weight)?"
)
_MAGNITUDE = re.compile(r".+\.(lora_magnitude_vector|weight_m_wdecomp|dora_scale|magnitude|m)(\.weight)?")
_PATTERNS = ("rank_pattern", "alpha_pattern")
RESTORE = "Restore the config that was saved with the tensors."
# By module, what PEFT's keys name of it.
Stems = Mapping[str, Mapping[str, Tensor]]


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


def of_tensors(source: Source) -> Iterator[Finding]:
    """NaN and infinity, and magnitudes in another dtype or shape than they should have."""
    bad = [key for key, tensor in source.tensors.items() if not _is_finite(tensor)]
    if bad:
        yield Finding(
            "not-finite", tuple(bad), "These tensors hold NaN or infinite values.",
            "Use an earlier checkpoint: training had diverged, or a row of W0 was zero and divided by.",
        )  # fmt: skip
    wide = (torch.float32, torch.float64)
    low = [key for key, t in source.tensors.items() if _MAGNITUDE.fullmatch(key) and t.dtype not in wide]
    if low:
        dtype = str(source.tensors[low[0]].dtype).removeprefix("torch.")
        yield Finding(
            "low-precision-magnitudes", tuple(low),
            f"These magnitudes are {dtype}, in which the change of a whole training is below one rounding step.",
            "Train with magnitudes in fp32 (dora_peft does), and save them so.",
        )  # fmt: skip
    flat = flat_scales(source)
    if flat:
        yield Finding(
            "one-dimensional-scale", tuple(flat),
            "These scales have one dimension: on square layers readers take output rows for input columns.",
            "Write them anew with `dora-peft convert --to lycoris`, which keeps the second dimension.",
        )  # fmt: skip


def flat_scales(source: Source) -> list[str]:
    """The keys of LyCORIS' magnitudes that have one dimension."""
    return [key for key, t in source.tensors.items() if key.endswith(".dora_scale") and t.dim() == 1]


def without_input_scales(source: Source) -> Source:
    """The same without those scales of one dimension that cannot be of output rows."""
    up = {key: source.tensors.get(f"{key.removesuffix('dora_scale')}lora_up.weight") for key in flat_scales(source)}
    drop = {key for key, B in up.items() if B is not None and len(B) != source.tensors[key].numel()}
    return replace(source, tensors={key: tensor for key, tensor in source.tensors.items() if key not in drop})


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or "float4" in str(tensor.dtype):
        # integers and fp4 have no other values
        return True
    # torch does not ask fp8
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def of_numbers(source: Source) -> Iterator[Finding]:
    """Numbers of the config that are none."""
    for entry, value in _config(source).items():
        if entry in ("r", "lora_alpha", *_PATTERNS, "lora_parameters"):
            numbers = value.values() if isinstance(value, dict) else [value]
            bad = [str(n)[:60] for n in numbers if isinstance(n, (int, float)) and not abs(n) <= sys.float_info.max]
            if bad:
                yield Finding("not-finite", (), f"{entry} in {CONFIG} is {bad[0]}, no finite number.", RESTORE)


def of_patterns(source: Source) -> Iterator[Finding]:
    """Regular expressions for ranks and alphas that whoever reads the adapter cannot use."""
    paths = list(stems_of(source))
    for entry in _PATTERNS:
        keys = _config(source).get(entry)
        if isinstance(keys, dict):
            try:
                matching(list(keys), [])
                # as PEFT puts them
                matching([rf"(.*\.)?({key})$" for key in keys if not is_plain(key)], paths)
            except PatternError as error:
                yield _unusable(entry, str(error))


def _unusable(entry: str, what: str) -> Finding:
    return Finding("unreadable", (), f"{entry} in {CONFIG} cannot be used: {what}.", RESTORE)


def _config(source: Source) -> Mapping[str, object]:
    """The config beside the file, or in its head as diffusers has it."""
    if source.config is not None:
        return source.config
    try:
        found = json.loads(source.metadata.get(DIFFUSERS, "{}"))
    except ValueError:
        # the reader says so
        return {}
    if not isinstance(found, dict):
        return {}
    return found if "r" in found else {name.partition(".")[2]: value for name, value in found.items()}


def stems_of(source: Source) -> dict[str, dict[str, Tensor]]:
    """By module, the tensors in PEFT's keys."""
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in source.tensors.items():
        match = _PEFT_KEY.fullmatch(key)
        if match:
            stems.setdefault(match[1], {})[match[2]] = tensor
    return stems


def of_config(source: Source, base: Base) -> Iterator[Finding]:
    """A config that says something else than the tensors."""
    config = source.config or {}
    if mlx.recognises(source):
        yield from _of_mlx(source, config)
    stems = stems_of(source)
    # ai-toolkit has PEFT's factors too, and a config does not belong to it
    if "peft_type" not in config or not stems or any(key.endswith(".magnitude") for key in source.tensors):
        return
    use_dora = config.get("use_dora")
    if not isinstance(use_dora, (bool, type(None))):
        yield Finding(
            "unclear-use-dora", (), f"use_dora in {CONFIG} is {str(use_dora)[:60]!r}, no boolean: readers take all "
            "but an empty value for true.", "Set it to true or false.",
        )  # fmt: skip
    with_m = tuple(path for path, parts in stems.items() if parts.keys() - _FACTORS)
    without = tuple(path for path in stems if path not in with_m)
    if says_dora(config) and without:
        yield _missing(without, len(stems), f"{CONFIG} says DoRA, and ")
    if with_m and not use_dora and not says_dora(config):
        yield _not_called(with_m, "use_dora", f"Set use_dora to true in {CONFIG}.")
    yield from _of_ranks(config, stems)
    yield from _of_names(config, set(stems), base)


def says_dora(config: Mapping[str, object]) -> bool:
    """Whether a config calls its adapter DoRA."""
    return config.get("use_dora") is True or config.get("peft_type") == "DORA" or config.get("fine_tune_type") == "dora"


def of_magnitudes(adapter: Adapter, source: Source) -> Iterator[Finding]:
    """Modules without a magnitude, in an adapter that was read."""
    without = tuple(path for path, module in adapter.modules.items() if module.magnitude is None)
    claims = says_dora(source.config or {})
    if without and (claims or len(without) < len(adapter.modules)):
        yield _missing(without, len(adapter.modules), f"{CONFIG} says DoRA, and " if claims else "")
    elif without:
        yield Finding(
            "plain-lora", without, "No module has a magnitude: this is a plain LoRA.",
            "Use it as such, or make a DoRA of it with `dora-peft convert --to dora`.",
        )  # fmt: skip


def _missing(modules: tuple[str, ...], of: int, says: str) -> Finding:
    return Finding(
        "magnitudes-missing", modules, f"{says}{len(modules)} of {of} modules have no magnitude: readers make them up.",
        "Use an intact checkpoint; the tool that exported this one dropped them.",
    )  # fmt: skip


def _not_called(modules: tuple[str, ...], entry: str, mend: str) -> Finding:
    return Finding(
        "not-called-dora", modules,
        f"These modules have magnitudes, and {CONFIG} does not say {entry}: readers ignore them.", mend,
    )  # fmt: skip


def _of_mlx(source: Source, config: Mapping[str, object]) -> Iterator[Finding]:
    with_m = tuple(key.removesuffix(".m") for key in source.tensors if key.endswith(".m"))
    if with_m and not says_dora(config):
        yield _not_called(with_m, "fine_tune_type dora", f"Set fine_tune_type to dora in {CONFIG}.")
    parameters = config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    other = tuple(
        key.removesuffix(".lora_a")
        for key, tensor in source.tensors.items()
        if key.endswith(".lora_a") and tensor.dim() == 2 and tensor.shape[1] != rank
    )
    if other and rank is not None:
        yield _other_ranks(other, "and mlx-lm cannot load them")


def _of_ranks(config: Mapping[str, object], stems: Stems) -> Iterator[Finding]:
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        return
    other = []
    for path, parts in stems.items():
        wanted = patterns.get(get_pattern_key(list(patterns), path), config.get("r"))
        factors = [parts[name] for name in ("lora_A", "lora_embedding_A") if name in parts]
        if any(factor.dim() > 0 and len(factor) != wanted for factor in factors):
            other.append(path)
    if other:
        yield _other_ranks(tuple(other), "so that s is wrong")


def _other_ranks(modules: tuple[str, ...], so: str) -> Finding:
    return Finding("other-ranks", modules, f"These modules have another rank than {CONFIG} says, {so}.", RESTORE)


def _named(targets: object, paths: Sequence[str]) -> Callable[[str], bool]:
    """Whether target_modules names a path, as PEFT takes it.

    Raises:
        PatternError: It is no usable entry.
    """
    if isinstance(targets, str):
        return matching([targets], paths)[0].__contains__
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        names = [str(name) for name in targets]
        return lambda path: any(path == name or path.endswith(f".{name}") for name in names)
    raise PatternError(f"expected a text or a list of texts, found {str(targets)[:60]!r}")


def _of_names(config: Mapping[str, object], adapted: set[str], base: Base) -> Iterator[Finding]:
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    paths = base.paths()
    try:
        named = _named(targets, sorted(adapted.union(paths)))
    except PatternError as error:
        yield _unusable("target_modules", str(error))
        return
    unnamed = tuple(sorted(path for path in adapted if not named(path)))
    if unnamed:
        yield Finding(
            "not-named", unnamed, f"These modules have tensors, and target_modules in {CONFIG} does not name them: "
            "readers leave them out.", RESTORE,
        )  # fmt: skip
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    whole = config.get("modules_to_save")
    # these are saved whole, and get no adapter
    saved = [f".{name}." for name in whole] if isinstance(whole, list) else []
    absent = tuple(
        path for path in paths
        if named(path) and path not in adapted and not any(name in f".{path}." for name in saved)
    )  # fmt: skip
    if absent and not narrowed:
        yield Finding(
            "named-without-tensors", absent, f"target_modules in {CONFIG} names these modules, and they have no "
            "tensors: readers leave them as they are, or make factors up.", "Use an intact checkpoint.",
        )  # fmt: skip
