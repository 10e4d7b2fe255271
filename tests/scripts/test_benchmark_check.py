"""The price of the check at toy size: what is timed, that the check is seen to work first, and the README's table."""

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch

import benchmark_check
import dora_peft
from benchmarks import cpu_page
from benchmarks.bases import SHAPES
from dora_peft import norms
from dora_peft.norms import state

# In the checking mode every check would compute the norm.
pytestmark = [pytest.mark.cached_norms, pytest.mark.implementation("torch")]
SMALL = ["--model", "tiny", "--rounds", "2", "--checks", "3", "--threads", "1"]
TINY = benchmark_check.Setting("decoding", "tiny", SHAPES["tiny"], 4, 5.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("check")
    with dora_peft.implementation("torch"):
        benchmark_check.main([*SMALL, "--results", str(folder)])
    return (folder / "check_tiny_cpu.json").read_text(encoding="utf-8")


@pytest.fixture
def report(stored: str) -> dict[str, Any]:
    return json.loads(stored)


def test_figures_belong_together(report: dict[str, Any]) -> None:
    assert {"device", "processor", "threads", "python", "versions", "commit", "modified"} <= set(report)
    assert [(f["part"], f["setting"].get("batch")) for f in report["check"]] == [
        ("training step", 4),
        ("training step", 4),
        ("decoding", None),
    ]
    for found in report["check"]:
        assert found["adapted_layers"] == 2 * 7
        assert found["checks"] == 2 * 3
        assert found["steps"] == (2 * benchmark_check.NEW_TOKENS if found["part"] == "decoding" else 2)
        step, check = found["step_ms"], found["check_ms"]
        assert 0 < check["q1"] <= check["median"] <= check["q3"]
        assert 0 < step["q1"] <= step["median"] <= step["q3"]
        assert found["percent"] == pytest.approx(100 * check["median"] / step["median"])
        assert found["us_per_layer"] * found["adapted_layers"] == pytest.approx(1000 * check["median"])
        assert found["percent_q1"] <= found["percent_q3"]
        assert found["percent"] < 100
        assert found["goal_percent"] is None


def test_printed_table_says_whether_goals_are_met(report: dict[str, Any]) -> None:
    results = report["check"]
    for found, goal in zip(results, (0, 100, None), strict=True):
        found["goal_percent"] = goal
    _, *lines = benchmark_check.format_table(results).splitlines()
    assert [line.split("  ")[0] for line in map(str.strip, lines)] == [
        "training step, tiny, 4 x 256 tokens, r=16",
        "training step, tiny, 4 x 8 tokens, r=8",
        "decoding, tiny, one token, r=16",
    ]
    ends = ("at most 0: missed", "at most 100: met", "-")
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True))


def test_goals_are_those_of_the_settings() -> None:
    assert [(s.model, s.rank, s.batch * s.seq_len, s.goal_percent) for s in benchmark_check.SETTINGS] == [
        ("llama-512", 16, 1024, 1.0),
        ("llama-384", 8, 32, 4.0),
        ("llama-512", 16, 1, 5.0),
    ]
    assert all(setting.shape.layers == 4 for setting in benchmark_check.SETTINGS)


def test_the_timed_step_refreshes_and_the_timed_checks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    refreshed: list[str] = []
    timed: list[tuple[str, int]] = []
    renew, seconds = norms.Norm.renew, benchmark_check.seconds

    def counting(*args: Any) -> Any:
        refreshed.append("norm")
        return renew(*args)

    def recording(call: Callable[[], Any]) -> float:
        before = len(refreshed)
        found = seconds(call)
        timed.append((call.__name__, len(refreshed) - before))
        return found

    monkeypatch.setattr(norms.Norm, "renew", counting)
    monkeypatch.setattr(benchmark_check, "seconds", recording)
    setting = benchmark_check.Setting("training step", "tiny", SHAPES["tiny"], 4, 1.0, batch=2, seq_len=4)
    options = Namespace(seed=0, rounds=1, checks=2)
    layers, _ = benchmark_check.measure_training(setting, options)
    # the warm-up is the first
    assert timed == 2 * [("step", layers), ("check", 0), ("check", 0)]


def test_a_check_that_sees_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layers = benchmark_check.build(TINY, seed=0)
    benchmark_check.verify_training(layers)
    monkeypatch.setattr(state, "_fits", lambda *args: True)
    with pytest.raises(RuntimeError, match=r"q_proj: expected a refresh after an edit of A or B, found the norm kept"):
        benchmark_check.verify_training(layers)
    monkeypatch.setattr(state, "_fits", lambda *args: False)
    with pytest.raises(RuntimeError, match=r"q_proj: expected the norm to be kept if nothing changed"):
        benchmark_check.verify_training(layers)


@torch.no_grad()
def test_a_shortcut_that_sees_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = benchmark_check.build(TINY, seed=0)
    model.eval()
    with pytest.raises(RuntimeError, match=r"q_proj: expected evaluation's shortcut to be open after a token"):
        benchmark_check.verify_decoding(layers)
    model(input_ids=torch.arange(4)[None])
    benchmark_check.verify_decoding(layers)
    monkeypatch.setattr(benchmark_check, "shortcut_is_open", lambda layer: True)
    with pytest.raises(RuntimeError, match=r"q_proj: expected an edit of A, B or m to shut the shortcut"):
        benchmark_check.verify_decoding(layers)


def test_readme_table(report: dict[str, Any]) -> None:
    heading, _, titles, _, *lines = cpu_page.check_table(report).splitlines()
    assert heading.startswith(f"On {report['device']} (")
    assert f"commit {(report['commit'] or 'unknown')[:9]}" in heading
    assert titles == "| | step or token | check | us a layer | share | goal |"
    assert [line.split("|")[1].strip() for line in lines] == [
        "training step: tiny, 2 layers, r=16, 4 x 256 tokens",
        "training step: tiny, 2 layers, r=8, 4 x 8 tokens",
        "decoding: tiny, 2 layers, r=16, 16 tokens after 64",
    ]
    assert all(line.endswith(f"| {f['percent']:.2f} % | - |") for line, f in zip(lines, report["check"], strict=True))
    report["check"][0]["goal_percent"] = 1.0
    assert cpu_page.check_table(report).splitlines()[4].endswith(" % | at most 1 % |")
    assert cpu_page.check_table(None) == ""


def test_the_page_has_the_table_where_the_result_is(report: dict[str, Any]) -> None:
    machine = {key: value for key, value in report.items() if key != "check"}
    against = {**machine, "against": {"options": {"suite": "step"}, "results": []}}
    page = cpu_page.cpu_page({"against_0_step_tiny_cpu": against})
    assert page.count("not measured yet") == 3
    page = cpu_page.cpu_page({"against_0_step_tiny_cpu": against, "check_cpu": report})
    assert page.count("not measured yet") == 2
    assert cpu_page.check_table(report) in page
