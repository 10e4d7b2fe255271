"""Files of LyCORIS, kohya's scripts and OneTrainer, and those made for ComfyUI as it is in 2026.

    <prefix>_<path with _ for .>.lora_down.weight        A [r, in], of a convolution [r, in, kernel ...]
    <prefix>_<path with _ for .>.lora_up.weight          B [out, r], of a convolution [out, r, 1 ...]
    <prefix>_<path with _ for .>.alpha                   s r; r if it is missing
    <prefix>_<path with _ for .>.dora_scale              m [out, 1], of a convolution [out, 1, 1 ...]

LyCORIS before 3.2, and OneTrainer unless it is told otherwise, take norms per input column: dora_scale is [1, in],
which is no DoRA per output row. ComfyUI divides by ||W0|| where the norm of W0 + s B A belongs, so that a file made for
it holds m ||W0|| / ||W0 + s B A||.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from .adapter import Adapter, Module, UnreadableError, check_holds, number_in
from .base import Base
from .files import Files
from .parts import gather, make_module, rank_of
from .peft_keys import lengths, needed, times
from .refit import refitted
from .source import Source, is_name

_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "m"}
_KEY = re.compile(r"(?P<name>.+?)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
_PREFIX = re.compile(r"^(lycoris|lora_unet|lora_transformer|lora_te\d*|lora)_")
# Where files that this package wrote say which path each flattened name is of.
PATHS = "dora_peft_paths"
AXES = ("output", "input")


def recognises(source: Source) -> bool:
    return any(key.endswith(".lora_down.weight") for key in source.tensors)


def read(
    source: Source, base: Base | None, axis: str | None = None, refit: bool = False, describe: bool = False
) -> Adapter:
    """An adapter in LyCORIS' keys.

    Args:
        source: The file.
        base: Says which path a flattened name is of, and with `refit` what is refitted.
        axis: "output" or "input": what the numbers of a one-dimensional dora_scale belong to.
        refit: Fit norms per output row to those per input column, where that is what the file has.
        describe: Leave such norms out, with a note, where the adapter is only looked at.

    Raises:
        UnreadableError: It holds what is no DoRA per output row, or what cannot be told without the base.
    """
    found, others = gather(source.tensors, _told)
    if others:
        raise UnreadableError(f"'{source.path}': cannot convert '{others[0]}'. {_reason(others[0])}")
    paths = _paths(source, found, base)
    modules, notes = {}, []
    for name, parts in found.items():
        path = paths[name]
        alpha = parts.get("alpha")
        if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
            raise UnreadableError(
                f"Module '{path}': alpha should be one number, found {list(alpha.shape)} {alpha.dtype}."
            )
        factors = {name: tensor for name, tensor in parts.items() if name != "m"}
        module = make_module(path, factors, rank_of(parts) if alpha is None else alpha.item())
        if "m" in parts:
            kind = _axis(path, parts["m"], module, axis)
            if kind == "output":
                module = make_module(path, parts, module.alpha)
            elif describe:
                notes.append(f"{path} has a norm per input column, which is no DoRA per output row")
            elif not refit:
                raise UnreadableError(
                    f"Module '{path}' has a norm per input column (dora_scale {list(parts['m'].shape)}), which is no "
                    "DoRA per output row. Pass --refit and --base to fit one to it; the error is printed per module."
                )
            else:
                weight = needed(base, "--refit").weight(path, module)
                module, error = refitted(weight, module, parts["m"].flatten())
                notes.append(f"{path}: refitted, error / update {error:.3g}")
        modules[path] = module
    return Adapter(modules, base=source.metadata.get("ss_sd_model_name"), notes=notes)


def _reason(key: str) -> str:
    if "lora_mid" in key:
        return "It is part of a Tucker decomposition, which is no product B A."
    for sign, what in (("hada_", "LoHa"), ("lokr_", "LoKr"), (".diff", "a full difference"), (".scalar", "a scalar")):
        if sign in key:
            return f"It is of {what}, not of a low-rank product B A with a magnitude."
    return "Expected lora_down.weight, lora_up.weight, alpha and dora_scale of each module."


def _told(key: str) -> tuple[str, str] | None:
    match = _KEY.fullmatch(key)
    return None if match is None else (match["name"], _PARTS[match["part"]])


def _axis(path: str, scale: Tensor, module: Module, given: str | None) -> str:
    """Whether dora_scale belongs to output rows or to input columns."""
    out, columns = module.out_features, module.lora_A.shape[1]
    if scale.dim() > 1 and scale.numel() == scale.shape[0] == out:
        return "output"
    if scale.dim() > 1 and scale.numel() == scale.shape[1] == columns:
        return "input"
    fitting = [name for name, size in zip(AXES, (out, columns), strict=True) if scale.numel() == size]
    if scale.dim() > 1 or not fitting:
        raise UnreadableError(
            f"Module '{path}' has a dora_scale of shape {list(scale.shape)}: expected [{out}, 1] or [1, {columns}]."
        )
    if len(fitting) == 1:
        return fitting[0]
    if given is None:
        raise UnreadableError(
            f"Module '{path}' is square and its dora_scale {list(scale.shape)} has one dimension, so that it may be of "
            "output rows or of input columns. Pass --axis output or --axis input; `dora-peft doctor` with --base tells."
        )
    return given


def _paths(source: Source, names: Iterable[str], base: Base | None) -> dict[str, str]:
    """The path of each flattened name."""
    known: dict[str, str] = {}
    if PATHS in source.metadata:
        try:
            known = dict(json.loads(source.metadata[PATHS]))
        except (ValueError, TypeError, RecursionError) as error:
            raise UnreadableError(f"'{source.path}': its metadata '{PATHS}' is damaged: {error}.") from error
        bad = [path for path in known.values() if not isinstance(path, str) or not is_name(path)]
        if bad:
            raise UnreadableError(
                f"'{source.path}': its metadata '{PATHS}' names {bad[0]!r}, which is no module's path."
            )
    kinds = {match[1] for name in names if (match := _PREFIX.match(name))}
    if len(kinds) > 1 and any(kind.startswith("lora_te") for kind in kinds):
        raise UnreadableError(
            f"'{source.path}' holds weights of more than one model ({', '.join(sorted(kinds))}): other formats hold an "
            "adapter of one. Split the file first."
        )
    flat: dict[str, list[str]] = {}
    for path in base.paths() if base else []:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    out = {}
    for name in names:
        short = _PREFIX.sub("", name)
        candidates = [known[name]] if name in known else flat.get(short, [])
        # a name with dots is a path already
        candidates = candidates or ([short] if "." in short else [])
        if len(candidates) != 1:
            why = f"'{base.name}' has no such module: name the base that the adapter was trained on" if base else ""
            why = why or "its path cannot be told from the name alone: name the base with --base"
            why = f"it may be {' or '.join(candidates)}, and no tensor says which" if candidates else why
            raise UnreadableError(f"'{source.path}': '{name}': {why}.")
        out[name] = candidates[0]
    twice = [path for path, count in Counter(out.values()).items() if count > 1]
    if twice:
        names = [name for name, path in out.items() if path == twice[0]]
        raise UnreadableError(
            f"'{source.path}': {' and '.join(names)} are the same module, '{twice[0]}': expected one."
        )
    return out


def write(adapter: Adapter, base: Base | None, name: str = "lycoris", prefix: str = "lycoris") -> Files:
    """The adapter in LyCORIS' keys; `name` is that of the format, for errors."""
    check_holds(adapter, name, convolutions=True)
    tensors: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    for path, module in adapter.modules.items():
        flat = f"{prefix}_{path.replace('.', '_')}"
        if flat in paths:
            raise UnreadableError(f"Modules '{paths[flat]}' and '{path}' have the same name in this format, '{flat}'.")
        paths[flat] = path
        tensors[f"{flat}.lora_down.weight"] = module.lora_A
        tensors[f"{flat}.lora_up.weight"] = module.lora_B
        tensors[f"{flat}.alpha"] = number_in(module.lora_A.dtype, module.alpha)
        if module.magnitude is not None:
            shape = (-1, *(1 for _ in module.lora_A.shape[1:]))
            tensors[f"{flat}.dora_scale"] = module.magnitude.view(shape)
    return Files("adapter_model.safetensors", tensors, {"format": "pt", PATHS: json.dumps(paths)})


def write_onetrainer(adapter: Adapter, base: Base | None) -> Files:
    """The same under the prefix of a model's main part, as OneTrainer and kohya's scripts have it."""
    return write(adapter, base, "onetrainer", "lora_unet")


def read_comfyui(
    source: Source, base: Base | None, axis: str | None = None, refit: bool = False, describe: bool = False
) -> Adapter:
    """A file made for ComfyUI of 2026."""
    weights = needed(base, "comfyui-2026")
    adapter = read(source, base, axis, refit, describe)
    return adapter.with_magnitudes(lambda path, module: times(module, _ratio(weights, path, module)))


def write_comfyui(adapter: Adapter, base: Base | None) -> Files:
    """A file that comes out right in ComfyUI of 2026."""
    weights = needed(base, "comfyui-2026")
    adapter = adapter.with_magnitudes(lambda path, module: times(module, 1 / _ratio(weights, path, module)))
    return write(adapter, base, "comfyui-2026", "lora_unet")


def _ratio(weights: Base, path: str, module: Module) -> Tensor:
    """||W0 + s B A|| / ||W0|| per output row."""
    before, composed = lengths(weights, path, module, "comfyui-2026")
    return composed / before
