"""The spelling task: its records, and how far an answer is from what a dictionary says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def read_records(path: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Read the first `limit` prompt/completion records of a JSON-lines file, all if None.

    Raises:
        ValueError: the file is empty or a record lacks a key.
    """
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines][:limit]
    if not records:
        raise ValueError(f"{path} holds no record")
    for number, record in enumerate(records, start=1):
        if missing := {"prompt", "completion"} - record.keys():
            raise ValueError(
                f"{path}, line {number}: expected the keys prompt and completion, missing {sorted(missing)}"
            )
    return records


def edit_distance(found: Sequence[str], expected: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions that turn `found` into `expected`."""
    row = list(range(len(expected) + 1))
    for i, symbol in enumerate(found, start=1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(expected, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != wanted))
    return row[-1]


def score(answers: Sequence[str], completions: Sequence[str]) -> dict[str, float]:
    """Compare answers with the expected completions, phoneme by phoneme.

    Returns:
        `exact_match`, the share of answers that are right in full, and `phoneme_error_rate`, the edit distances over
        the number of expected phonemes; the latter passes 1 if answers are too long.
    """
    pairs = [(answer.split(), completion.split()) for answer, completion in zip(answers, completions, strict=True)]
    errors = sum(edit_distance(found, expected) for found, expected in pairs)
    return {
        "exact_match": sum(found == expected for found, expected in pairs) / len(pairs),
        "phoneme_error_rate": errors / sum(len(expected) for _, expected in pairs),
    }
