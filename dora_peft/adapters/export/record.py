"""dora_export.json: what an exported folder is, what it lost, and the command that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import cast

from ..formats import UnreadableError
from ..formats.source import read_json

NAME = "dora_export.json"
# Above which an error or a share of lost rows is warned of.
BOUND = 0.01
_WATCHED = {"error_over_update": "error / update", "share_lost": "the share of rows whose c is lost"}


@dataclass(frozen=True)
class Record:
    """An export.

    Attributes:
        route: "exact", "lora" or "merged".
        dtype: Of the tensors written, as torch calls it.
        base, adapters: As they were named.
        statement: How exact it is, in a sentence.
        totals: Numbers of all modules together.
        modules: Numbers of each, by its path.
        notes: What a reader should know, a sentence each.
        command: What made it; None if it was a call in Python.
    """

    route: str
    dtype: str
    base: str
    adapters: Sequence[str]
    statement: str
    totals: Mapping[str, float]
    modules: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = field(default_factory=list)
    command: str | None = None

    def write(self, folder: Path) -> Path:
        """Into a folder."""
        path = folder / NAME
        path.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")
        return path

    def warnings(self) -> list[str]:
        """What exceeds 1 %, a sentence for each kind of number with the worst module."""
        said = []
        for name, what in _WATCHED.items():
            over = {path: own[name] for path, own in self.modules.items() if own.get(name, 0.0) > BOUND}
            if over:
                worst = max(over, key=lambda path: over[path])
                said.append(
                    f"{what} is above {BOUND:.0%} in {len(over)} of {len(self.modules)} modules, at most "
                    f"{over[worst]:.2%} in '{worst}'"
                )
        return said


def read_record(folder: Path) -> Record | None:
    """What a folder says of its export; None if it is no export.

    Raises:
        UnreadableError: The file is damaged, or another tool's.
    """
    path = folder / NAME
    found = read_json(path)
    if found is None:
        return None
    for name, fits in _FITS.items():
        if not fits(found.get(name)):
            raise UnreadableError(
                f"Cannot read '{path}': its {name} is {str(found.get(name))[:60]!r}, which `dora-peft export` does not "
                "write. Export the adapter again."
            )
    known = {one.name: found[one.name] for one in fields(Record) if one.name in found}
    return Record(**known)  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())


def _are_modules(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_numbers, cast("dict[str, object]", value).values()))


# What `Record.write` writes, by the names of its entries.
_FITS = {
    "route": lambda value: value in ("exact", "lora", "merged"),
    **dict.fromkeys(("dtype", "base", "statement"), _is_text),
    **dict.fromkeys(("adapters", "notes"), _are_texts),
    "totals": _are_numbers,
    "modules": _are_modules,
    "command": lambda value: value is None or _is_text(value),
}
