"""Search for disagreements between DoRA models and a dense float64 oracle: the long run of tests/search.

    python scripts/search.py --examples 10000       # under 15 minutes on one core
    python scripts/search.py --examples 50 --output outputs/search.json      # in seconds

Random models, adapters and sequences of operations (training, merging, saving, edits through `.data`, kernels that
write through raw pointers, ...) run with the package and with tests/search/oracle.py, which is written from the paper
and shares no code with it. Needs the extra `test`.

Expected result: a line per hundred examples, then counts and `ok`; the same as scripts/search_results/search.json, with
seed, versions and commit. `FAIL` and exit status 1 if, of at least 10,000 examples, an operation ran fewer than 200
times or 0.1 % or more disagree, or if a disagreement of any run is not explained in EXPLAINED.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine

ROOT = Path(__file__).parents[1]
# the search is a test that is used here as a program
sys.path.insert(0, str(ROOT / "tests" / "search"))

from runner import Report, names, run  # noqa: E402 - found by the line above

# runs of each operation in the long search
LEAST = 200
# of the examples may disagree
SHARE = 0.001
# Kinds of disagreement that are understood and stay, with the reason.
EXPLAINED: dict[str, str] = {}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=positive, default=10_000, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "search_results" / "search.json")
    return parser.parse_args(arguments)


def problems(report: Report) -> list[str]:
    """What is wrong with a report, in words."""
    found = [
        f"{what} ({count} times): {report.minimal[what]}"
        for what, count in report.kinds.items()
        if what not in EXPLAINED
    ]
    if report.examples >= 10_000:
        counts = {name: report.operations[name] for name in names()}
        found += [f"{name} ran {n} times only" for name, n in counts.items() if n < LEAST]
        if sum(report.kinds.values()) >= SHARE * report.examples:
            found.append(f"{sum(report.kinds.values())} of {report.examples} examples disagree")
    return found


def result(report: Report, seed: int) -> dict[str, Any]:
    """What is stored."""
    machine = describe_machine(torch.device("cpu"))
    machine["versions"]["hypothesis"] = version("hypothesis")
    disagreements = [
        {"what": what, "count": count, "minimal": report.minimal[what], "explanation": EXPLAINED.get(what)}
        for what, count in report.kinds.most_common()
    ]
    counts = {"operations": report.operations, "consumers": report.consumers}
    return {
        "examples": report.examples,
        "seed": seed,
        "seconds": round(report.seconds, 1),
        "disagreeing": sum(report.kinds.values()),
        "disagreements": disagreements,
        **{name: dict(counter.most_common()) for name, counter in counts.items()},
        **machine,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # the tensors are tiny
    torch.set_num_threads(1)
    start = time.monotonic()

    def progress(examples: int) -> None:
        if examples % 100 == 0:
            print(f"{examples} of {options.examples} examples, {time.monotonic() - start:.0f} s", flush=True)

    report = run(options.examples, options.seed, progress=progress)
    write_json(options.output, result(report, options.seed))
    for name, count in report.operations.most_common():
        print(f"{count:7} {name}")
    found = problems(report)
    print(
        f"{report.examples} examples, {sum(report.kinds.values())} disagree, {report.seconds:.0f} s: {options.output}"
    )
    print("\n".join(["FAIL", *found]) if found else "ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
