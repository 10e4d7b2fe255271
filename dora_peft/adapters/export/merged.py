"""Route `merged`: a base whose weights are W', written file by file without loading the model.

Each adapted module's W0 is read, made W' by the function that `merge_and_unload` calls on the same blocks, and written;
everything else is copied. The result equals that of `merge_and_unload` bit for bit on the same device, with the same
number of threads and the same versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...layers import merge_checks
from ..formats import Checkpoint, UnreadableError
from ..formats.base import skeleton
from ..formats.source import CONFIG
from .adapted import AdaptedBase, Trained
from .manifest import digest_files
from .names import Group, Names
from .writing import Piece, Report, write_model

Make = Callable[[], Tensor]


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
        force: Replace a model at `out`.
        finish: Called with the unfinished folder and the notes when the model is in it, to write what belongs to it.
        progress: Called with the key of each tensor that is written.

    Raises:
        UnreadableError: A weight cannot be merged. Nothing is written, unless it is W' itself that is not finite.
        FileExistsError, NotWrittenError: See `write_model`.
    """
    checkpoint = adapted.checkpoint
    if "quantization_config" in checkpoint.config:
        # dequantised weights come through AdaptedBase.stored, and `pieces_of` replaces the others' codes
        raise UnreadableError(
            f"'{checkpoint.name}' is quantised, and W' has no codes: expected a base of floats. Name the base before "
            "quantisation."
        )
    check_all(adapted)
    pieces, untied = pieces_of(adapted, dtype, lambda path: adapted.merged(path, dtype))
    config = config_of(checkpoint, dtype, untied)
    notes = [f"{name} is untied from {', '.join(others)}, in the files and in config.json" for name, others in untied]
    files = write_model(
        checkpoint, out, pieces, dtype=dtype, config=config, options=options_of(adapted, "merged"),
        finish=None if finish is None else lambda folder: finish(folder, notes), force=force, progress=progress,
    )  # fmt: skip
    return Merged(files, len(adapted.layers), notes)


def check_all(adapted: AdaptedBase) -> None:
    """See that each adapted module can be merged, and is in the files once.

    Raises:
        UnreadableError: One is not; nothing has been read or written.
    """
    layers = list(adapted.layers.items())
    merge_checks.note_other_names(adapted.model, layers)
    for path, layer in layers:
        try:
            layer.check_mergeable(brought_in=False)
        except NotImplementedError as error:
            raise UnreadableError(str(error)) from error
        adapted.names.check(f"{path}.weight")


def options_of(adapted: AdaptedBase, route: str) -> dict[str, str]:
    """What a run must share with the one that it goes on after."""
    options = {"route": route, "device": adapted.device.type}
    for number, source in enumerate(adapted.sources):
        files = [source.path, source.path.parent / CONFIG]
        options[f"adapter {number + 1}"] = digest_files(path for path in files if path.is_file())
    return options


def pieces_of(
    adapted: AdaptedBase, dtype: torch.dtype | None, weight: Callable[[str], Tensor]
) -> tuple[list[Piece], list[tuple[str, list[str]]]]:
    """What is made anew, and which parameters are untied from which others thereby.

    Args:
        adapted: The base and its adapters.
        dtype: Of the new weights; each weight's own if None.
        weight: Gives the new weight of an adapted module by its path, in the module's layout.
    """
    names = adapted.names
    changes, untied = _changes(adapted, dtype, weight)
    pieces: list[Piece] = []
    groups: dict[int, tuple[Group, dict[str, Make]]] = {}
    for parameter, make in changes.items():
        if names.has(parameter):
            group = names.group(parameter)
            groups.setdefault(id(group), (group, {}))[1][parameter] = make
        else:
            key = names.new_key(parameter)
            pieces.append(Piece((), partial(_alone, key, make), _nbytes(names, names.group(parameter), dtype)))
    for group, makes in groups.values():
        nbytes = _nbytes(names, group, dtype)
        pieces.append(Piece(tuple(group.keys), partial(_together, names, group, makes, dtype), nbytes))
    return pieces, untied


def _changes(
    adapted: AdaptedBase, dtype: torch.dtype | None, weight: Callable[[str], Tensor]
) -> tuple[dict[str, Make], list[tuple[str, list[str]]]]:
    """How each parameter that the adapters change is made; with those that have to stand alone for that."""
    names = adapted.names
    changes: dict[str, Make] = {f"{path}.weight": partial(weight, path) for path in adapted.layers}
    for path in adapted.quantised.paths if adapted.quantised is not None else ():
        changes.setdefault(f"{path}.weight", partial(_requantised, adapted, path, dtype))
    rows: dict[str, Make] = {}
    for parameter, trained in adapted.trained().items():
        names.check(parameter)
        if trained.rows is None:
            changes[parameter] = partial(_trained, names, parameter, trained, dtype)
            continue
        # PEFT writes them into the table that all share
        for name in (parameter, *names.shared(parameter)):
            rows[name] = partial(_trained, names, name, trained, dtype)
    untied: list[tuple[str, list[str]]] = []
    for parameter in list(changes):
        others = names.shared(parameter)
        if others and not any(parameter in known for _, known in untied):
            untied.append((parameter, others))
            for other in others:
                # as it was, under a key of its own
                changes.setdefault(other, rows.get(other) or partial(_read, names, other, dtype))
    for name, make in rows.items():
        if names.has(name):
            changes.setdefault(name, make)
    return changes, untied


def _alone(key: str, make: Make) -> dict[str, Tensor]:
    return {key: make()}


def _together(names: Names, group: Group, makes: Mapping[str, Make], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a group of parameters some of which are made anew."""
    values = {} if set(makes) == set(group.parameters) else names.values(group)
    values = {name: _to(tensor, dtype) for name, tensor in values.items() if name not in makes}
    for name, make in makes.items():
        values[name] = make()
    return names.tensors(group, values)


def _requantised(adapted: AdaptedBase, path: str, dtype: torch.dtype | None) -> Tensor:
    """The weight of a module that no adapter changes, as it was in training."""
    stored = adapted.names.read(f"{path}.weight")
    return adapted.requantised(path, stored).to(stored.dtype if dtype is None else dtype)


def _trained(names: Names, parameter: str, trained: Trained, dtype: torch.dtype | None) -> Tensor:
    return trained.over(_read(names, parameter, dtype))


def _read(names: Names, parameter: str, dtype: torch.dtype | None) -> Tensor:
    return _to(names.read(parameter), dtype)


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _nbytes(names: Names, group: Group, dtype: torch.dtype | None) -> int:
    entries = [names.checkpoint.entries[key] for key in group.keys]
    return sum(
        entry.nbytes if dtype is None or entry.dtype is None else entry.nbytes // entry.dtype.itemsize * dtype.itemsize
        for entry in entries
    )


def config_of(
    checkpoint: Checkpoint, dtype: torch.dtype | None, untied: Sequence[tuple[str, list[str]]]
) -> dict[str, object]:
    """The new config.json.

    Raises:
        UnreadableError: Parameters that are written apart would be tied by it again.
    """
    config = deepcopy(checkpoint.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if not untied:
        return config
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    model = skeleton(config)
    assert model is not None
    names = Names(checkpoint, model)
    for name, _ in untied:
        if names.shared(name):
            raise UnreadableError(
                f"'{name}' is tied to '{names.shared(name)[0]}' by the model's class, whatever its config says, and "
                "an adapter changes one of them. Merge it with merge_and_unload."
            )
    return config
