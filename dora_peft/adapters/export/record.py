"""dora_export.json: what an exported folder is, what it lost, and the command that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
        for name, what in (
            ("error_over_update", "error / update"),
            ("share_lost", "the share of rows whose c is lost"),
        ):
            over = {path: own[name] for path, own in self.modules.items() if own.get(name, 0.0) > BOUND}
            if over:
                worst = max(over, key=lambda path: over[path])
                said.append(
                    f"{what} is above {BOUND:.0%} in {len(over)} of {len(self.modules)} modules, at most "
                    f"{over[worst]:.2%} in '{worst}'"
                )
        return said
