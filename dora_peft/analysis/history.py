"""The records of an analysis: how each module had changed at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from .change import Change


class Record(TypedDict):
    """dM and dD of one module after so many optimizer steps."""

    step: int
    module: str
    magnitude: float
    direction: float


History = list[Record]


def to_history(step: int, changes: Mapping[str, Change]) -> History:
    """One record per module, for changes by module path."""
    return [
        {"step": step, "module": name, "magnitude": change.magnitude, "direction": change.direction}
        for name, change in changes.items()
    ]
