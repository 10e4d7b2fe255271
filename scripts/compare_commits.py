"""Whether a change made a benchmark slower or larger: processes of an older commit and of this tree in turn.

    python scripts/compare_commits.py COMMIT SUITE [--processes 5] [options of benchmark.py]
    python scripts/compare_commits.py 3440182 step --dropout 0,0.05    # 10 to 15 minutes on 2 cores
    python scripts/compare_commits.py HEAD step --model tiny --processes 1 --rounds 1   # half a minute; says nothing

COMMIT is checked out into a temporary git worktree, removed at the end, also after an error, Ctrl-C or SIGTERM.
`scripts/benchmark.py SUITE` then runs in either tree, with that tree's package, in pairs of processes whose order
alternates, so that a machine which grows slower favours neither. All options but those below go to benchmark.py;
`--contenders dora` is added if no contenders are named. "New" is this tree as it lies there, edits included.

Expected result: for each setting, of the contender `dora`, median [least, most] over the pairs of new / old; the same
of what is relative to LoRA within each process, from which the machine's state cancels; and of LoRA itself, which no
change to the package touches, so that it shows what these ratios are worth. What is kept for backward is exact, and its
difference is given in units of LoRA's. All of it is stored with device, versions and both commits as
scripts/benchmarks/results/against_COMMIT_SUITE_MODEL_DEVICE[_TAG].json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import read_options, result_path
from benchmarks.report import QUANTITIES, RESULTS, describe, format_value
from benchmarks.suites import SUITES
from common.arguments import positive
from common.files import write_json

ROOT = Path(__file__).resolve().parent.parent
CONTENDER = "dora"
MACHINE = ("device", "processor", "threads", "python", "versions", "commit", "modified")
FIND_PACKAGE = "import importlib.util; print(importlib.util.find_spec('dora_peft').origin)"
Report = dict[str, Any]


def run_git(*arguments: str) -> str:
    """The output of a git command in this repository.

    Raises:
        SystemExit: with git's own message.
    """
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"error: git {arguments[0]}: {result.stderr.strip()}")
    return result.stdout.strip()


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: through every `finally`."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of `commit` below `folder`, for as long as the context lasts."""
    tree = folder / "old"
    try:
        run_git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        yield tree
    finally:
        if tree.exists():
            run_git("worktree", "remove", "--force", str(tree))


def environment(tree: Path) -> dict[str, str]:
    """This process's environment, in which Python imports the package of `tree`."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))}


def check_package(tree: Path, folder: Path) -> None:
    """Make sure that a process for `tree` imports its package; one that is installed may stand in its way.

    Raises:
        RuntimeError: with the package that would be imported.
    """
    command = [sys.executable, "-c", FIND_PACKAGE]
    found = subprocess.run(command, env=environment(tree), cwd=folder, capture_output=True, text=True, check=True)
    if Path(found.stdout.strip()).resolve().parents[1] != tree.resolve():
        raise RuntimeError(f"expected dora_peft from {tree}, found {found.stdout.strip()}; nothing was measured.")


def run_benchmark(tree: Path, folder: Path, suite: str, arguments: Sequence[str]) -> Report:
    """What one process of the tree's own benchmark stores."""
    path = folder / "result.json"
    script = str(tree / "scripts" / "benchmark.py")
    # of transformers about PEFT
    python = [sys.executable, "-W", "ignore::FutureWarning"]
    command = [*python, script, suite, *arguments, "--json", str(path)]
    status = subprocess.run(command, env=environment(tree), stdout=subprocess.DEVNULL).returncode
    if status != 0:
        raise RuntimeError(f"the benchmark of {tree} ended with status {status}; its message stands above.")
    report = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if CONTENDER in report["skipped"]:
        raise RuntimeError(f"the benchmark of {tree} left {CONTENDER} out: {report['skipped'][CONTENDER]}")
    return report


def run_pairs(trees: dict[str, Path], processes: int, folder: Path, suite: str, arguments: Sequence[str]) -> Any:
    """Reports of each tree, one a pair; who comes first alternates."""
    reports: dict[str, list[Report]] = {name: [] for name in trees}
    for pair in range(processes):
        for name in list(trees)[:: -1 if pair % 2 else 1]:
            start = time.perf_counter()
            reports[name].append(run_benchmark(trees[name], folder, suite, arguments))
            print(f"[{pair + 1}/{processes}] {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return reports


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def divided(new: Sequence[float], old: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most of the paired ratios; None if there is something that cannot be divided by."""
    return spread([a / b for a, b in zip(new, old, strict=True)]) if all(old) and len(new) == len(old) else None


def find(report: Report, quantity: str, setting: dict[str, Any]) -> dict[str, Any] | None:
    found = [r for r in report["results"] if (r["quantity"], r["setting"]) == (quantity, setting)]
    return found[0] if found and CONTENDER in found[0]["contenders"] else None


def compare(olds: Sequence[Report], news: Sequence[Report]) -> list[dict[str, Any]]:
    """One result for each setting that both commits measured.

    Raises:
        RuntimeError: if there is none.
    """
    results = []
    for result in news[0]["results"]:
        quantity, setting, reference = result["quantity"], result["setting"], result["reference"]
        pair = [[find(report, quantity, setting) for report in reports] for reports in (olds, news)]
        if None in (*pair[0], *pair[1]):
            print(f"note: {describe(setting)}: {quantity} left out, not measured by both commits", flush=True)
            continue
        values: dict[str, list[float]] = {}
        for name, found in zip(("old", "new"), pair, strict=True):
            ours = [one["contenders"][CONTENDER] for one in found]
            values[name] = [figures["median"] for figures in ours]
            values[f"{name}_to_reference"] = [figures["ratio"] for figures in ours if "ratio" in figures]
            units = [one["contenders"].get(reference) for one in found]
            values[f"{name}_reference"] = [unit["median"] for unit in units if unit is not None]
        relative = values["new_to_reference"], values["old_to_reference"]
        compared = {
            "quantity": quantity,
            "setting": setting,
            "reference": reference,
            **values,
            "ratio": divided(values["new"], values["old"]),
            "ratio_to_reference": divided(*relative) if all(relative) else None,
            "reference_ratio": divided(values["new_reference"], values["old_reference"])
            if values["old_reference"]
            else None,
        }
        if quantity == "saved_mib":
            compared["difference"] = spread([new - old for new, old in zip(*relative, strict=True)])
        results.append(compared)
    if not results:
        raise RuntimeError("the two commits measured nothing in common.")
    return results


def format_spread(found: dict[str, float] | None, template: str = "{:.3f}") -> str:
    if found is None:
        return "-"
    median, least, most = (template.format(found[key]) for key in ("median", "min", "max"))
    return f"{median} [{least}, {most}]"


def format_result(result: dict[str, Any]) -> str:
    """A heading, and one line a way to compare: median [least, most] over the pairs."""
    old, new = (format_value(statistics.median(result[name])) for name in ("old", "new"))
    reference = result["reference"]
    lines = {
        f"{CONTENDER}, new / old": format_spread(result["ratio"]),
        f"{CONTENDER} / {reference}, new / old": format_spread(result["ratio_to_reference"]),
        f"{reference} itself, new / old": format_spread(result["reference_ratio"]),
    }
    if "difference" in result:
        lines[f"{CONTENDER}, new - old, of {reference}'s"] = format_spread(result["difference"], "{:+.4f}")
    width = max(map(len, lines))
    heading = f"{describe(result['setting'])}: {QUANTITIES[result['quantity']]}, {old} -> {new}"
    return "\n".join([heading, *(f"  {label.ljust(width)}  {found}" for label, found in lines.items())])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("commit", help="the older commit")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--processes", type=positive, default=5, help="of each commit (5)")
    parser.add_argument("--json", type=Path, help="where to write instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options, arguments = parser.parse_known_args(argv)
    if not any(word.partition("=")[0] == "--contenders" for word in arguments):
        arguments += ["--contenders", CONTENDER]
    # ends with a message if benchmark.py would
    benchmarked = read_options([options.suite, *arguments])
    commit = run_git("rev-parse", "--verify", f"{options.commit}^{{commit}}")
    path = options.json or options.results / f"against_{commit[:9]}_{result_path(benchmarked).name}"

    with ending_on_sigterm(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with checked_out(commit, folder) as tree:
            trees = {"old": tree, "new": ROOT}
            for each in trees.values():
                check_package(each, folder)
            reports = run_pairs(trees, options.processes, folder, options.suite, arguments)

    last = reports["new"][-1]
    results = compare(reports["old"], reports["new"])
    against = {
        "commit": commit,
        "versions": reports["old"][-1]["versions"],
        "processes": options.processes,
        "options": last["options"],
        "results": results,
    }
    write_json(path, {key: last[key] for key in MACHINE} | {"against": against})
    print(f"\n{options.suite}, {benchmarked.model}, against {commit[:9]}; median [least, most] of the pairs:")
    for result in results:
        print(f"\n{format_result(result)}")
    versions = ", ".join(f"{package} {number}" for package, number in last["versions"].items())
    state = f"{last['commit'] or 'unknown'}{', modified' if last['modified'] else ''}"
    print(f"\n{last['device']} ({last['processor']}), threads {last['threads']}; {versions}; commit {state}")
    print(f"{options.processes} processes of each commit in turn; wrote {path}", flush=True)


if __name__ == "__main__":
    main()
