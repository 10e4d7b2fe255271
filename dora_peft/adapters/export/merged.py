"""Route `merged`: a base whose weights are W', written file by file without loading the model.

Each adapted module's W0 is read, made W' by the function that `merge_and_unload` calls on the same blocks, and written;
everything else is copied. The result equals that of `merge_and_unload` bit for bit on the same device, with the same
number of threads and the same versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .adapted import AdaptedBase
from .pieces import check_all, config_of, options_of, pieces_of
from .writing import Report, write_model


@dataclass(frozen=True)
class Merged:
    """What `export_merged` did.

    Attributes:
        files: What was written.
        modules: How many adapted modules were merged.
        notes: What a reader should know, a sentence each.
    """

    files: Sequence[Path]
    modules: int
    notes: list[str] = field(default_factory=list)


def export_merged(
    adapted: AdaptedBase,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    weight: Callable[[str], Tensor] | None = None,
    force: bool = False,
    finish: Callable[[Path, list[str]], list[Path]] | None = None,
    progress: Report | None = None,
) -> Merged:
    """Write a base model with adapters merged into its weights.

    Args:
        adapted: The base and its adapters.
        out: The folder to write. What is unfinished lies beside it, see `write_model`.
        dtype: Of the new weights, which W0 is brought to before it is merged, as if the model were loaded in it; each
            weight's own if None.
        weight: Gives W' of a module by its path, in the new dtype; `adapted.merged` if None.
        force: Replace a model at `out`.
        finish: Called with the unfinished folder and the notes when the model is in it, to write what belongs to it.
        progress: Called with the key of each tensor that is written.

    Raises:
        UnreadableError: A weight cannot be merged. Nothing is written, unless it is W' itself that is not finite.
        FileExistsError, NotWrittenError: See `write_model`.
    """
    checkpoint = adapted.checkpoint
    check_all(adapted)
    pieces, untied = pieces_of(adapted, dtype, weight or (lambda path: adapted.merged(path, dtype)))
    config = config_of(adapted, dtype, untied)
    notes = [f"{name} is untied from {', '.join(others)}, in the files and in config.json" for name, others in untied]
    files = write_model(
        checkpoint, out, pieces, dtype=dtype, config=config, options=options_of(adapted, "merged"),
        finish=None if finish is None else lambda folder: finish(folder, notes), force=force, progress=progress,
    )  # fmt: skip
    return Merged(files, len(adapted.layers), notes)
