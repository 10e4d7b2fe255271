"""A benchmark that was ended goes on behind the settings that it has measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import SMALL

import benchmark
from benchmarks import footprint, suites

pytestmark = pytest.mark.cached_norms
STEP = ["step", *SMALL, "--seq-len", "8", "--rank", "2,3", "--contenders", "dora", "--resume"]


def interrupted(monkeypatch: pytest.MonkeyPatch, module: Any, after: int) -> list[int]:
    """The ranks that contenders are built for; the process "ends" once there are more than `after`."""
    ranks: list[int] = []
    build = module.build_contenders

    def counted(base: Any, options: Any, skipped: Any, rank: int, *rest: Any, **named: Any) -> Any:
        ranks.append(rank)
        if len(ranks) > after:
            raise KeyboardInterrupt
        return build(base, options, skipped, rank, *rest, **named)

    monkeypatch.setattr(module, "build_contenders", counted)
    return ranks


@pytest.mark.parametrize("changed", [[], ["--seed", "1"]], ids=["the same", "other options"])
def test_a_step_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str]) -> None:
    words = [*STEP, "--results", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupted(patch, suites, after=1)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["step_tiny_cpu.partial"]
    before = json.loads((tmp_path / "step_tiny_cpu.partial").read_text())["results"]
    with monkeypatch.context() as patch:
        ranks = interrupted(patch, suites, after=9)
        benchmark.main([*words, *changed])
    # measured with other options, nothing is kept
    assert ranks == ([2, 3] if changed else [3])
    report = json.loads((tmp_path / "step_tiny_cpu.json").read_text())
    assert [result["setting"]["rank"] for result in report["results"]] == [2, 3]
    assert (report["results"][:1] == before) is not bool(changed)
    assert not list(tmp_path.glob("*.partial"))


def test_without_resume_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in STEP if word != "--resume"]
    interrupted(monkeypatch, suites, after=1)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*words, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_memory_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["memory", *SMALL, "--seq-len", "8", "--rank", "2", "--contenders", "dora", "--no-peak", "--resume"]
    words += ["--results", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupted(patch, footprint, after=4)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(words)
    with monkeypatch.context() as patch:
        ranks = interrupted(patch, footprint, after=9)
        benchmark.main(words)
    assert len(ranks) == 2
    settings = [result["setting"] for result in json.loads((tmp_path / "memory_tiny_cpu.json").read_text())["results"]]
    assert len(settings) == len({json.dumps(setting) for setting in settings}) == 6
