"""The search: random models, adapters and sequences of operations against the oracle.

`examine` runs one case; `run` generates many with hypothesis and counts. Named so, because a module `search` would hide
`scripts/search.py`, which is on the tests' path too.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import consumers
import edits  # noqa: F401 - enters its operations
import hypothesis
import lifecycle  # noqa: F401
import passes  # noqa: F401
import torch
from hypothesis import strategies as st
from models import CONFIGS, MODELS, ConfigSpec, ModelSpec
from operations import OPERATIONS, WEIGHTS, Op, Skip
from world import Disagreement, World


@dataclass(frozen=True)
class Case:
    """One model, its first adapter, and what happens to it."""

    model: ModelSpec
    config: ConfigSpec
    operations: tuple[Op, ...]


@dataclass
class Report:
    """What `run` found.

    Attributes:
        operations, consumers: How often each was run and compared.
        kinds: Number of disagreements by kind.
        minimal: The shortest case found for each kind, as text.
    """

    examples: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    consumers: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    minimal: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def operations(drawn: list[str]) -> st.SearchStrategy[Op]:
    """One operation. hypothesis prefers the ends of a range, so a name's place in it is scattered."""
    return st.builds(
        Op,
        name=st.integers(0, 2**16 - 1).map(lambda n: drawn[n * 40503 % 2**16 % len(drawn)]),
        consumer=st.sampled_from(consumers.NAMES),
        a=st.integers(0, 11),
        b=st.integers(0, 15),
    )


def names() -> list[str]:
    """All operations."""
    return list(OPERATIONS)


def cases(without: tuple[str, ...] = ()) -> st.SearchStrategy[Case]:
    """Cases of three to seven operations, each drawn as often as its weight says; none of those in `without`."""
    drawn = [name for name, weight in WEIGHTS.items() if name not in without for _ in range(weight)]
    sequences = st.lists(operations(drawn), min_size=3, max_size=7).map(tuple)
    return st.builds(Case, MODELS, CONFIGS, sequences)


def examine(case: Case, report: Report | None = None) -> None:
    """Run one case.

    Raises:
        Disagreement: The first that is found. An exception of the package's is one too.
    """
    report = Report() if report is None else report
    world = World(case.model, case.config)
    # the factors' initial values
    torch.manual_seed(case.config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            named(world.start, "creation")
            for op in case.operations:
                try:
                    named(lambda op=op: OPERATIONS[op.name](world, op), op.name)
                    report.operations[op.name] += 1
                except Skip:
                    continue
        finally:
            report.consumers.update(world.used)
            world.close()


def named(call: Callable[[], Any], where: str) -> None:
    try:
        call()
    except (Disagreement, Skip):
        raise
    except Exception as error:
        first = str(error).split("\n", 1)[0]
        raise Disagreement(f"{where}: {type(error).__name__}: {first[:90]}") from error


def run(
    examples: int, seed: int, *, without: tuple[str, ...] = (), progress: Callable[[int], None] | None = None
) -> Report:
    """Run that many cases and count; a disagreement does not end it."""
    report, failing = Report(), {}
    start = time.monotonic()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(without))
    def each(case: Case) -> None:
        report.examples += 1
        try:
            examine(case, report)
        except Disagreement as error:
            report.kinds[error.what] += 1
            failing.setdefault(error.what, case)
        if progress is not None:
            progress(report.examples)

    each()
    report.minimal = {what: describe(shorten(case, what)) for what, case in failing.items()}
    report.seconds = time.monotonic() - start
    return report


def disagreement(case: Case) -> str | None:
    """What kind of disagreement the case shows."""
    try:
        examine(case)
    except Disagreement as error:
        return error.what
    return None


def shorten(case: Case, what: str) -> Case:
    """The case with whatever can be left out or made simple while it still shows this disagreement."""
    changed = True
    while changed:
        changed = False
        for smaller in simpler(case):
            if disagreement(smaller) == what:
                case, changed = smaller, True
                break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing fewer."""
    for i in range(len(case.operations)):
        yield replace(case, operations=case.operations[:i] + case.operations[i + 1 :])
    for part, default in (("model", ModelSpec()), ("config", ConfigSpec())):
        value: Any = getattr(case, part)
        for name, plain in vars(default).items():
            if getattr(value, name) != plain:
                yield replace(case, **{part: replace(value, **{name: plain})})
    for i, op in enumerate(case.operations):
        for name in ("consumer", "a", "b"):
            plain = getattr(Op(op.name), name)
            if getattr(op, name) != plain:
                changed = replace(op, **{name: plain})
                yield replace(case, operations=(*case.operations[:i], changed, *case.operations[i + 1 :]))


def describe(case: Case) -> str:
    """Only what differs from the simplest case."""

    def brief(value: Any, plain: Any) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(value).items() if v != getattr(plain, k))

    steps = "; ".join(f"{op.name}({brief(op, Op(op.name))})" for op in case.operations)
    return f"model({brief(case.model, ModelSpec())}) adapter({brief(case.config, ConfigSpec())}): {steps}"
