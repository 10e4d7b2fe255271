"""What is made anew in a base's files for its adapters, and how: weights, what is trained besides, tied parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from ...layers import merge_checks
from ..formats import UnreadableError
from ..formats.base import skeleton
from ..formats.source import CONFIG
from .adapted import AdaptedBase, Trained
from .manifest import digest_files
from .names import Group, Names
from .writing import Piece

Make = Callable[[], Tensor]


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
        if path not in adapted.coded:
            adapted.names.check(f"{path}.weight")


def options_of(adapted: AdaptedBase, route: str) -> dict[str, str]:
    """What a run must share with the one that it goes on after."""
    again = None if adapted.quantised is None else adapted.quantised.record
    options = {"route": route, "device": adapted.device.type, "base quantised": json.dumps(again, sort_keys=True)}
    for number, source in enumerate(adapted.sources):
        files = [source.path, source.path.parent / CONFIG]
        options[f"adapter {number + 1}"] = digest_files(path for path in files if path.is_file())
    return options


def pieces_of(
    adapted: AdaptedBase,
    dtype: torch.dtype | None,
    weight: Callable[[str], Tensor],
    codes: Callable[[str], dict[str, Tensor]] | None = None,
) -> tuple[list[Piece], list[tuple[str, list[str]]]]:
    """What is made anew, and which parameters are untied from which others thereby.

    Args:
        adapted: The base and its adapters.
        dtype: Of the new weights; each weight's own if None.
        weight: Gives the new weight of an adapted module by its path, in the module's layout.
        codes: Gives the new tensors of an adapted module whose weight is quantised, by key. The base is written in
            floating point if None.
    """
    names = adapted.names
    changes, untied = _changes(adapted, dtype, weight)
    pieces = _of_codes(adapted, dtype, weight, codes)
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
    floats = (path for path in adapted.layers if path not in adapted.coded)
    changes: dict[str, Make] = {f"{path}.weight": partial(weight, path) for path in floats}
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


def _of_codes(
    adapted: AdaptedBase,
    dtype: torch.dtype | None,
    weight: Callable[[str], Tensor],
    codes: Callable[[str], dict[str, Tensor]] | None,
) -> list[Piece]:
    """What is made of the weights that are quantised in the files."""
    pieces = []
    for path, name in adapted.coded.items():
        known = adapted.codes(path)
        assert known is not None
        if codes is None:
            to = adapted.dtype_of(path) if dtype is None else dtype
            make = partial(weight, path) if path in adapted.layers else partial(_dense, adapted, path, to)
            nbytes = known.out_features * known.in_features * to.itemsize
            pieces.append(Piece(known.keys, partial(_alone, f"{name}.weight", make), nbytes))
        elif path in adapted.layers:
            # scales may become fp32, and those that were quantised themselves at most four times as large
            nbytes = 4 * sum(adapted.checkpoint.entries[key].nbytes for key in known.keys)
            pieces.append(Piece(known.keys, partial(codes, path), nbytes))
    return pieces


def _dense(adapted: AdaptedBase, path: str, dtype: torch.dtype) -> Tensor:
    return adapted.stored(path).to(dtype)


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
    adapted: AdaptedBase,
    dtype: torch.dtype | None,
    untied: Sequence[tuple[str, list[str]]],
    *,
    keeps_codes: bool = False,
) -> dict[str, object]:
    """The new config.json.

    Args:
        adapted, dtype: As for `pieces_of`.
        untied: What that gave.
        keeps_codes: Whether a quantised base stays so.

    Raises:
        UnreadableError: Parameters that are written apart would be tied by it again.
    """
    checkpoint = adapted.checkpoint
    config = deepcopy(checkpoint.config)
    if adapted.coded:
        _requantised_config(config, keeps_codes)
        if dtype is None and not keeps_codes:
            dtype = adapted.dtype_of(next(iter(adapted.coded)))
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


def _requantised_config(config: dict[str, object], keeps_codes: bool) -> None:
    """What a config says of how a base is quantised: nothing, if its weights are written in floating point."""
    found = config.get("quantization_config")
    if not keeps_codes:
        config.pop("quantization_config", None)
        config.pop("compression_config", None)
    elif isinstance(found, dict) and found.get("bnb_4bit_use_double_quant"):
        # the statistics of scaled rows are written as numbers
        found["bnb_4bit_use_double_quant"] = False
