"""An adapter in one tool's format, written in another's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import peft_rows
from .doctor_norms import FROM_TORCHTUNE, norms_of
from .formats import FORMATS, Adapter, Base, Files, Module, UnreadableError, format_of, read_source, write_files
from .formats.files import check_target
from .formats.lycoris import AXES
from .formats.source import Source
from .formats.torchtune import heads_of

DORA = "dora"
TARGETS = (*FORMATS, DORA)
# Formats with a dora_scale, whose axis a file may not say.
SCALES = ("lycoris", "onetrainer", "comfyui-2026")
# Initialisations that change the base's weights.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or would do.

    Attributes:
        source, target: The formats.
        files: What was written, or would be.
        nbytes: Of all tensors.
        free: Bytes free in the file system of the target.
        modules: How many were converted.
        notes: What a reader should know, a sentence each.
    """

    source: str
    target: str
    files: Sequence[Path]
    nbytes: int
    free: int
    modules: int
    notes: list[str] = field(default_factory=list)


def convert(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    source_format: str | None = None,
    base: str | os.PathLike[str] | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    axis: str | None = None,
    refit: bool = False,
    dry_run: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Report | None = None,
) -> Conversion:
    """Write an adapter in another tool's format.

    Args:
        adapter: A folder, a file, or "owner/name" or "owner/name@revision" on the Hub.
        out: The folder to write; or a file, if it ends in ".safetensors" and the format is one file.
        to: One of `FORMATS`, or "dora": a plain LoRA as a DoRA in PEFT's format with m = ||W0 + s B A||, which gives
            the same outputs.
        source_format: Instead of what the keys say; needed for "trtllm" and "comfyui-2026", which share others' keys.
        base: The base model: a folder, a name on the Hub, or the model itself. Needed where magnitudes are written in
            relation to its weights, where names are flattened, and for rows that are ordered by heads.
        dtype: Of the tensors written; those of the adapter if None.
        device: Where norms are computed.
        axis: "output" or "input", for a one-dimensional dora_scale on a square layer.
        refit: Fit norms per output row to norms per input column.
        dry_run: Only say what would be written.
        force: Replace what is at `out`.
        allow_pickle: Also read what torch.save wrote, its tensors alone.
        progress: Called with the path of each module whose base weight is read.

    Raises:
        UnreadableError: The adapter cannot be read, its base is another one, or the format cannot hold it.
        FileExistsError: Something is at `out`, and `force` is not set or it is no adapter.
        ValueError: `out` lies below a file, or is one file for a format of more.
        OSError: The system cannot write. Nothing is half-written in any case.
    """
    if to not in TARGETS:
        raise UnreadableError(f"There is no format '{to}': expected one of {', '.join(TARGETS)}.")
    source = read_source(adapter, allow_pickle=allow_pickle)
    weights = None if base is None else Base(base, device, progress)
    name = source_format or format_of(source)
    read = read_checked(source, name, weights, axis, refit=refit)
    _check_finite(source.tensors, f"'{source.path}'", "Use an earlier checkpoint.")
    _check_config(read, to)
    read = _as_dora(read, weights) if to == DORA else read
    _check_magnitudes(read, source)
    if weights is not None and name in ("peft", "nvlabs"):
        _check_order(read, weights)
    files = _cast(FORMATS["peft" if to == DORA else to].write(read, weights), dtype)
    _check_finite(files.tensors, f"What would be written as {to}", "Choose --dtype fp32 or bf16.")
    notes = list(read.notes)
    if dtype in (torch.bfloat16, torch.float16) and any(m.magnitude is not None for m in read.modules.values()):
        notes.append("magnitudes are in 16 bits, as asked: the change of a whole training may be below their rounding")
    target = check_target(files, out, force=force)
    paths = [target] if target.suffix == ".safetensors" else [target / files.name, *(target / f for f in files.json)]
    free = shutil.disk_usage(_existing(target)).free
    if not dry_run:
        paths = write_files(files, target, force=force)
    return Conversion(name, to, paths, files.nbytes, free, len(read.modules), notes)


def read_checked(
    source: Source, name: str, base: Base | None, axis: str | None, *, refit: bool = False, describe: bool = False
) -> Adapter:
    """`read_as`, and that the base is the adapter's by its shapes."""
    adapter = read_as(source, name, base, axis=axis, refit=refit, describe=describe)
    if base is not None:
        base.check(adapter)
    return adapter


def read_as(
    source: Source,
    name: str,
    base: Base | None,
    *,
    axis: str | None = None,
    refit: bool = False,
    describe: bool = False,
) -> Adapter:
    """Read a source as one format's; with `describe` also what could not be converted, as far as it can be told.

    Raises:
        UnreadableError: There is no such format, or `axis` or `refit` do not belong to it.
    """
    if name not in FORMATS:
        raise UnreadableError(f"There is no format '{name}': expected one of {', '.join(FORMATS)}.")
    read = FORMATS[name].read
    if axis is not None and axis not in AXES:
        raise UnreadableError(f"--axis: expected one of {', '.join(AXES)}, found {axis!r}.")
    scales = name in SCALES
    if axis is not None or refit or (describe and scales):
        if not scales:
            raise UnreadableError(
                f"--axis and --refit are for dora_scale of LyCORIS and OneTrainer, and this is {name}."
            )
        read = partial(read, axis=axis, refit=refit, describe=describe)  # type: ignore[call-arg]
    return read(source, base)


def _as_dora(adapter: Adapter, base: Base | None) -> Adapter:
    """A plain LoRA with m = ||W0 + s B A||."""
    if base is None:
        raise UnreadableError("--to dora takes magnitudes from the base's weights: name the base with --base.")
    modules: dict[str, Module] = {}
    notes = list(adapter.notes)
    for path, module in adapter.modules.items():
        if module.magnitude is not None:
            raise UnreadableError(f"This adapter is DoRA already: module '{path}' has a magnitude.")
        norms = base.row_norms(path, module)
        empty = norms <= peft_rows.TINY
        if bool(empty.any()):
            module = _filled(path, module, empty)
            norms = base.row_norms(path, module)
            notes.append(f"{path}: {int(empty.sum())} rows of zeros got a tiny entry in B, which plain PEFT needs")
        modules[path] = replace(module, magnitude=norms.float())
    return replace(adapter, modules=modules, notes=notes)


def _filled(path: str, module: Module, empty: Tensor) -> Module:
    """The module with an entry of B in its empty rows, so that their norms are not 0: PEFT would divide by it."""
    matrix = module.lora_A.flatten(1)
    row = int(matrix.abs().amax(1).argmax())
    if not (module.scaling and bool(matrix[row].any())):
        raise UnreadableError(
            f"Module '{path}' has {int(empty.sum())} rows of zeros in its base, by whose norm plain PEFT divides, and "
            "its A or s is 0 as well, so that no entry of B mends them. Leave the module out."
        )
    half = torch.float16 in (module.lora_A.dtype, module.lora_B.dtype)
    lora_B = module.lora_B.clone()
    lora_B[empty.to(lora_B.device), row] = peft_rows.entry(module.scaling, matrix[row], half)
    return replace(module, lora_B=lora_B)


def _check_config(adapter: Adapter, to: str) -> None:
    """Refuse what a config says of the base or of other tensors, and the target has no place for."""
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGES_BASE) and to != "peft":
        raise UnreadableError(
            f"This adapter was initialised by {init[:20]!r}, which changes the base's weights whenever it is loaded, "
            f"and {to} has no place for that. Save it with path_initial_model_for_weight_conversion first."
        )
    if adapter.config.get("lora_bias") and to != "peft":
        raise UnreadableError(f"This adapter has lora_bias, biases of B, and {to} has no place for them.")


def _check_order(adapter: Adapter, base: Base) -> None:
    """Tell torchtune's exports, which have PEFT's keys, and magnitudes of q and k in torchtune's order."""
    for path, module in adapter.modules.items():
        if module.magnitude is None or heads_of(path, base, module.out_features) is None:
            continue
        if norms_of(path, module, module.magnitude, base).fitting == FROM_TORCHTUNE:
            raise UnreadableError(
                f"The magnitudes of '{path}' fit the base's norms in torchtune's order of rows only, as its exporter "
                "leaves them. Pass --from torchtune."
            )


def _check_finite(tensors: Mapping[str, Tensor], what: str, mend: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UnreadableError(f"{what} holds NaN or infinite values in '{key}' ({dtype}). {mend}")


def _check_magnitudes(adapter: Adapter, source: Source) -> None:
    bare = [path for path, module in adapter.modules.items() if module.magnitude is None]
    if len(bare) == len(adapter.modules):
        raise UnreadableError(
            f"'{source.path}' is a plain LoRA: no module has a magnitude. Pass --to dora and --base to make a DoRA of "
            "it that gives the same outputs."
        )
    if bare:
        raise UnreadableError(
            f"'{source.path}' has magnitudes in some modules only: '{bare[0]}' ({len(bare)} of {len(adapter.modules)}) "
            "has none. Use an intact checkpoint."
        )


def _cast(files: Files, dtype: torch.dtype | None) -> Files:
    if dtype is None:
        return files

    def cast(key: str, tensor: Tensor) -> Tensor:
        # an alpha is a number, not a weight
        return tensor.to(dtype) if tensor.is_floating_point() and not key.endswith(".alpha") else tensor

    return replace(files, tensors={key: cast(key, tensor) for key, tensor in files.tensors.items()})


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.is_dir())
