"""Route `exact`: a base whose rows are c W0, and a plain LoRA c s B A over it.

    y = c (x W0^T + s (x A^T) B^T) + b  =  x (c W0)^T + (x A^T) (c s B)^T + b

which any server of LoRA computes. It is exact up to rounding of W0: c W0 is rounded to the dtype of the new base, and
in bf16 a row whose |c - 1| is below 2^-9 comes out as W0's own. splitting.py takes W' apart and measures that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..formats import Files, write_files
from .adapted import AdaptedBase, kernel_of
from .codes import codes_among
from .fingerprint import KEY
from .pieces import check_all, config_of, options_of, pieces_of
from .plain import Factors, plain_adapter
from .splitting import Loss, loss_of, scaled, split
from .writing import Report, places, write_model

# The folders of an export.
BASE, ADAPTER = "base", "adapter"
# To whose models PEFT adds `modules_to_save` of its own.
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class Exact:
    """What `export_exact` did, or would do.

    Attributes:
        dtype: Of the new base and of the adapter.
        losses: By the path of each adapted module.
        rank: Of the plain LoRA; 0 if the adapters are magnitudes alone, and there is none.
        files: What was written.
        notes: What a reader should know, a sentence each.
    """

    dtype: torch.dtype
    losses: dict[str, Loss]
    rank: int
    files: list[Path]
    notes: list[str]


def export_exact(
    adapted: AdaptedBase,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    dequantize: bool = False,
    force: bool = False,
    dry_run: bool = False,
    finish: Callable[[Exact, Path], Path] | None = None,
    progress: Report | None = None,
) -> Exact:
    """Write `out`/base, whose rows are c W0, and `out`/adapter, the plain LoRA c s B A over it.

    Args:
        adapted: The base and its adapters.
        out: The folder to write, complete or absent. What is unfinished lies beside it, see `write_model`.
        dtype: Of the new base and the adapter; fp32, with a note, if a number is too large for it.
        dequantize: Write a quantised base in floating point; else its codes stay, and its scales take c.
        force: Replace an export at `out`.
        dry_run: Measure the losses alone.
        finish: Called with what is known of the export and each of the two folders, to write what belongs to them.
        progress: Called with the path of each module that is measured and the key of each tensor that is written.

    Raises:
        UnreadableError: A module has no rows that could be scaled, or has another rank than servers take.
        FileExistsError, NotWrittenError: See `write_model`.
    """
    check_all(adapted)
    if not dry_run:
        # measuring takes as long as writing
        places(Path(out), adapted.checkpoint.folder, BASE, force=force)
    notes: list[str] = []
    wide = _too_large(adapted, dtype)
    measured = {} if wide else {path: _measure(adapted, path, dtype, dequantize, progress) for path in adapted.layers}
    wide = wide or next((path for path, (loss, _) in measured.items() if not isfinite(loss.error)), None)
    if wide is not None and dtype != torch.float32:
        notes.append(f"warning: everything is in fp32: {str(dtype).removeprefix('torch.')} overflows in '{wide}'")
        dtype = torch.float32
        measured = {path: _measure(adapted, path, dtype, dequantize, progress) for path in adapted.layers}
    losses = {path: loss for path, (loss, _) in measured.items()}
    files, more = _adapter_files(adapted, measured, out, dtype)
    notes += more
    rank = next(iter(files.tensors.values())).shape[0] if files is not None else 0
    done = Exact(dtype, losses, rank, [], notes)
    keeps_codes = bool(adapted.coded) and not dequantize
    pieces, untied = pieces_of(
        adapted, dtype, lambda path: _served(adapted, path, dtype),
        (lambda path: _rescaled(adapted, path, dtype)) if keeps_codes else None,
    )  # fmt: skip
    notes += [f"{name} is untied from {', '.join(others)}, in the files and in config.json" for name, others in untied]
    config = config_of(adapted, dtype, untied, keeps_codes=keeps_codes)
    if dry_run:
        return done

    def beside(partial: Path) -> list[Path]:
        written = [] if files is None else write_files(files, partial / ADAPTER, force=True)
        folders = [BASE] if files is None else [BASE, ADAPTER]
        return written + [finish(done, partial / folder) for folder in folders if finish is not None]

    done.files[:] = write_model(
        adapted.checkpoint, out, pieces, dtype=dtype, config=config, options=options_of(adapted, "exact"),
        subfolder=BASE, finish=beside, force=force, progress=progress,
    )  # fmt: skip
    return done


def _adapter_files(
    adapted: AdaptedBase,
    measured: Mapping[str, tuple[Loss, Factors]],
    out: str | os.PathLike[str],
    dtype: torch.dtype,
) -> tuple[Files | None, list[str]]:
    """The plain LoRA, which knows the weights of its base, with notes; None if the adapters are magnitudes alone."""
    factors = {path: own for path, (_, own) in measured.items() if bool(own.lora_B.any())}
    if not factors:
        return None, [f"there is no '{ADAPTER}' beside '{BASE}', which holds all: the adapters are magnitudes alone"]
    turned, task = _turned(adapted, factors), task_of(adapted)
    base_name = str((Path(out) / BASE).absolute())
    files, notes = plain_adapter(factors, dtype, base_name, fan_in_fan_out=turned, task_type=task)
    files.metadata[KEY] = json.dumps({path: loss.digest for path, (loss, _) in measured.items()})
    return files, notes


def _measure(
    adapted: AdaptedBase, path: str, dtype: torch.dtype, dequantize: bool, progress: Report | None
) -> tuple[Loss, Factors]:
    """What rounding costs a module, and the factors of its plain LoRA."""
    if progress is not None:
        progress(path)
    with adapted.at_hand(path) as layer:
        parts, base = adapted.parts(path, layer), layer.get_base_layer()
        whole = split(parts)
        own = Factors(whole.lora_A, whole.lora_B, isinstance(base, nn.Embedding), kernel_of(base)).rounded(dtype)
        codes = None if dequantize else adapted.codes(path)
        if codes is None:
            served = scaled(layer, whole.scale, dtype)
        else:
            new = codes_among(adapted.checkpoint, adapted.coded[path], codes.times(whole.scale, dtype))
            served = adapted.in_layout(path, new.dequantise(0, new.out_features))
        return loss_of(layer, parts, served, (own.lora_A, own.lora_B)), own


def _served(adapted: AdaptedBase, path: str, dtype: torch.dtype) -> Tensor:
    with adapted.at_hand(path) as layer:
        return scaled(layer, split(adapted.parts(path, layer)).scale, dtype)


def _rescaled(adapted: AdaptedBase, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a quantised module whose rows are c W0."""
    codes = adapted.codes(path)
    assert codes is not None
    with adapted.at_hand(path) as layer:
        return codes.times(split(adapted.parts(path, layer)).scale, dtype)


def _too_large(adapted: AdaptedBase, dtype: torch.dtype) -> str | None:
    """The first of the tensors that are copied with a number too large for `dtype`; those made anew are measured."""
    limit = torch.finfo(dtype).max
    paths = [path for path in adapted.layers if path not in adapted.coded]
    changed = {key for path in paths for key in adapted.names.keys(f"{path}.weight")}
    for key, entry in adapted.checkpoint.entries.items():
        floats = entry.dtype is not None and entry.dtype.is_floating_point
        if floats and torch.finfo(entry.dtype).max > limit and key not in changed:  # type: ignore[arg-type]
            tensor = adapted.checkpoint.tensor(key)
            if tensor.numel() and tensor.abs().max().item() > limit:
                return key
    return None


def _turned(adapted: AdaptedBase, paths: Iterable[str]) -> bool:
    return any(isinstance(adapted.layers[path].get_base_layer(), Conv1D) for path in paths)


def task_of(adapted: AdaptedBase) -> str | None:
    """PEFT's name of what the model is for, as the first adapter's config has it.

    None for classifiers: PEFT would ask the adapter's file for their heads, which are in the base.
    """
    found = adapted.configs[0].task_type
    name = None if found is None else str(getattr(found, "value", found))
    return None if name in _WITH_HEADS else name
