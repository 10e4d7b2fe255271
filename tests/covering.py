"""Covering sets: instead of all combinations of several factors, so few that each two values still meet."""

from collections.abc import Iterable
from itertools import combinations, product


def pairs(*factors: Iterable[object]) -> list[tuple[object, ...]]:
    """Combinations for `pytest.mark.parametrize` in which each value of a factor meets each value of every other.

    Chosen greedily and always the same: the one of all combinations that brings most new meetings, the first of equals.
    """
    values = [list(factor) for factor in factors]
    rows = {row: set(combinations(enumerate(row), 2)) for row in product(*(range(len(factor)) for factor in values))}
    missing, chosen = set().union(*rows.values()), []
    while missing:
        row = max(rows, key=lambda row: len(rows[row] & missing))
        chosen.append(row)
        missing -= rows[row]
    return [tuple(factor[index] for factor, index in zip(values, row, strict=True)) for row in chosen]
