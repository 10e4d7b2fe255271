"""Two commits in turn: each tree imports its own package, pairs alternate, the worktree is gone whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import compare_commits

ROOT = Path(__file__).resolve().parents[2]
# Takes benchmark.py's command line and writes what it would, with the figures of the package that it imports.
STUB = textwrap.dedent(
    '''
    """Stands for benchmark.py."""
    import json, os, pathlib, sys

    import dora_peft

    arguments = sys.argv[1:]
    path = pathlib.Path(arguments[arguments.index("--json") + 1])
    with open(os.environ["STUB_LOG"], "a") as log:
        log.write(json.dumps([dora_peft.NAME, arguments[:-2]]) + "\\n")
    if dora_peft.NAME == os.environ.get("STUB_FAILS"):
        sys.exit(3)

    def contenders(**values):
        return {name: {"median": value, "ratio": value / values["lora"]} for name, value in values.items()}

    time_ms, kept = contenders(lora=10.0, dora=dora_peft.TIME_MS), contenders(lora=200.0, dora=dora_peft.KEPT)
    results = [
        {"quantity": "time_ms", "setting": {"rank": 16}, "reference": "lora", "contenders": time_ms},
        {"quantity": "saved_mib", "setting": {"rank": 16}, "reference": "lora", "contenders": kept},
        {"quantity": "time_ms", "setting": dora_peft.OWN, "reference": "lora", "contenders": time_ms},
    ]
    machine = {"device": "d", "processor": "p", "threads": 1, "python": "3", "versions": {"dora_peft": "0"}}
    machine |= {"commit": dora_peft.NAME, "modified": False}
    path.write_text(json.dumps({**machine, "options": {"rank": [16]}, "skipped": {}, "results": results}))
    '''
)


def git(repository: Path, *arguments: str) -> str:
    person = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(repository), *person, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_package(repository: Path, name: str, time_ms: float, kept: float) -> str:
    package = repository / "dora_peft" / "__init__.py"
    package.parent.mkdir(exist_ok=True)
    package.write_text(f"NAME, TIME_MS, KEPT, OWN = {name!r}, {time_ms}, {kept}, {{'rank': {name!r}}}\n")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", name)
    return git(repository, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits whose benchmarks take no time: `before` is the first, `after` lies in the tree."""
    folder = tmp_path / "repository"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "benchmark.py").write_text(STUB)
    git(tmp_path, "init", "--quiet", str(folder))
    commit_package(folder, "before", time_ms=8.0, kept=240.0)
    commit_package(folder, "after", time_ms=10.0, kept=242.0)
    monkeypatch.setattr(compare_commits, "ROOT", folder)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    # as where another copy of the package is on the path
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


def runs(repository: Path) -> list[tuple[str, list[str]]]:
    return [tuple(json.loads(line)) for line in (repository.parent / "log").read_text().splitlines()]


def worktrees(repository: Path) -> int:
    return len(git(repository, "worktree", "list").splitlines())


def compare(repository: Path, *flags: str) -> dict[str, Any]:
    results = repository.parent / "results"
    compare_commits.main(["HEAD~1", "step", "--results", str(results), *flags])
    (path,) = results.iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


def test_each_tree_imports_its_own_package(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = git(repository, "rev-parse", "HEAD~1")
    against = compare(repository, "--processes", "3", "--model", "tiny", "--tag", "x", "--device", "cpu")["against"]
    expected = ["step", "--model", "tiny", "--tag", "x", "--device", "cpu", "--contenders", "dora"]
    assert [arguments for _, arguments in runs(repository)] == 6 * [expected]
    assert [name for name, _ in runs(repository)] == ["before", "after", "after", "before", "before", "after"]
    (path,) = (repository.parent / "results").iterdir()
    assert path.name == f"against_{first[:9]}_step_tiny_cpu_x.json"
    assert (against["commit"], against["processes"]) == (first, 3)

    # the third setting is not the same in both
    times, kept = against["results"]
    assert times["old"] == [8.0] * 3
    assert times["new"] == [10.0] * 3
    assert times["ratio"] == {"median": 1.25, "min": 1.25, "max": 1.25}
    # LoRA takes as long
    assert times["ratio_to_reference"] == times["ratio"]
    assert times["reference_ratio"]["median"] == 1
    assert "difference" not in times
    assert kept["difference"]["median"] == pytest.approx(2 / 200)
    assert worktrees(repository) == 1
    printed = capsys.readouterr().out
    assert "time_ms left out, not measured by both commits" in printed
    assert "+0.0100 [+0.0100, +0.0100]" in printed


def test_named_contenders_stay(repository: Path) -> None:
    compare(repository, "--processes", "1", "--contenders=dora,frozen")
    assert [arguments for _, arguments in runs(repository)] == 2 * [["step", "--contenders=dora,frozen"]]


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_failing_process_leaves_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setenv("STUB_FAILS", failing)
    with pytest.raises(RuntimeError, match="ended with status 3"):
        compare(repository)
    assert worktrees(repository) == 1
    assert not (repository.parent / "results").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_leaves_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    seen = []

    def interrupted(tree: Path, *rest: Any) -> None:
        seen.append((tree, worktrees(repository)))
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(compare_commits, "run_benchmark", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    # a shell starts what runs in its background with Ctrl-C ignored
    asked = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            compare(repository)
    finally:
        signal.signal(signal.SIGINT, asked)
    assert [count for _, count in seen] == [2]
    assert not seen[0][0].exists()
    assert worktrees(repository) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_package_in_the_way_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_commits, "environment", lambda tree: os.environ | {"PYTHONPATH": str(ROOT)})
    with pytest.raises(RuntimeError, match=r"expected dora_peft from .*, found .*__init__\.py; nothing was measured"):
        compare(repository)
    assert worktrees(repository) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["unknown", "step"], "error: git rev-parse: fatal: Needed a single revision"),
        (["HEAD", "all"], "invalid choice: 'all'"),
        (["HEAD", "step", "--dropout", "1"], "found '1'"),
        (["HEAD", "step", "--proc", "1"], "unrecognized arguments: --proc"),
    ],
)
def test_wrong_options(repository: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_commits.main(flags)
    assert message in capsys.readouterr().err + str(ended.value)
    assert worktrees(repository) == 1


def report(*values: tuple[float, float]) -> list[dict[str, Any]]:
    """Reports of processes with these medians of LoRA and DoRA."""
    return [
        {
            "results": [
                {
                    "quantity": "time_ms",
                    "setting": {},
                    "reference": "lora",
                    "contenders": {"lora": {"median": lora}, "dora": {"median": dora, "ratio": dora / lora}},
                }
            ]
        }
        for lora, dora in values
    ]


def test_a_machine_that_slows_down_cancels_from_what_is_relative_to_lora() -> None:
    (found,) = compare_commits.compare(report((10, 10), (20, 20), (40, 40)), report((15, 16.5), (30, 33), (20, 22)))
    # of the pairs, not of the medians: 1.1
    assert found["ratio"] == {"median": 1.65, "min": 0.55, "max": 1.65}
    assert found["reference_ratio"] == {"median": 1.5, "min": 0.5, "max": 1.5}
    assert {key: round(value, 9) for key, value in found["ratio_to_reference"].items()} == dict.fromkeys(
        ("median", "min", "max"), 1.1
    )


def test_counts_that_lora_has_not_are_compared_alone() -> None:
    counts = report((1, 1))
    counts[0]["results"][0]["contenders"] = {"lora": {"median": 0.0}, "dora": {"median": 1.0}}
    (found,) = compare_commits.compare(counts, counts)
    assert found["ratio"]["median"] == 1
    assert found["ratio_to_reference"] is found["reference_ratio"] is None
    with pytest.raises(RuntimeError, match="measured nothing in common"):
        compare_commits.compare([{"results": []}], counts)


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Path]:
    """A repository with one commit of this package and these scripts."""
    for name in ("dora_peft", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / "copied" / name, ignore=ignored)
    git(tmp_path, "init", "--quiet", str(tmp_path / "copied"))
    git(tmp_path / "copied", "add", "--all")
    git(tmp_path / "copied", "commit", "--quiet", "--message", "all")
    return tmp_path / "copied"


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["step", "memory"])
def test_a_commit_against_itself(copied: Path, suite: str) -> None:
    path = copied.parent / "result.json"
    small = "--model tiny --layers 1 --rounds 1 --warmup 1 --batch 2 --seq-len 16 --no-peak --device cpu --threads 1"
    command = [sys.executable, str(copied / "scripts" / "compare_commits.py"), "HEAD", suite, *small.split()]
    command += ["--processes", "1", "--json", str(path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(copied)}, cwd=copied.parent)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["commit"] == stored["against"]["commit"] == git(copied, "rev-parse", "HEAD")
    assert {"device", "processor", "threads", "python", "versions", "modified"} <= set(stored)
    assert str(copied.parent) not in path.read_text(encoding="utf-8")
    assert stored["against"]["results"]
    for found in stored["against"]["results"]:
        assert len(found["old"]) == len(found["new"]) == 1
        assert found["ratio"]["median"] == pytest.approx(found["new"][0] / found["old"][0])
        if found["quantity"] == "saved_mib":
            assert found["ratio"] == found["reference_ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
            assert found["difference"] == {"median": 0.0, "min": 0.0, "max": 0.0}
    assert worktrees(copied) == 1
