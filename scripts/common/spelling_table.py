"""The table of what each export leaves of an adapter's accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def spelling_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line an export, from the rows that scripts/export_accuracy.py stores."""
    lines = [
        "| route | dtype | words right | phoneme errors | answers as the DoRA model's | error / update |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        totals = row.get("totals", {})
        error = f"{totals['error_over_update']:.2g}" if totals else "-"
        lines.append(
            f"| {_route(row)} | {row['dtype']} | {row['exact_match']:.1%} | {row['phoneme_error_rate']:.1%} | "
            f"{row['same_answers']:.1%} | {error} |"
        )
    return "\n".join(lines)


def _route(row: Mapping[str, Any]) -> str:
    if row["route"] == "dora":
        return "the DoRA model itself"
    rank = "" if row.get("rank") is None else f" --rank {row['rank']}"
    return f"`{row['route']}{rank}{' --calibration' * bool(row.get('weighted'))}`"
