"""The file of runs: done once, kept, adopted; and the statistics over seeds and rates."""

import json

import pytest
import torch

from reproduction import common as reproduce_common
from reproduction import report as report
from reproduction import verdicts as verdicts
from reproduction.common import Options, Runs, at_edge, difference, interval, lowest


def test_runs_are_done_once(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"value": 3.0}

    options = Options(results=tmp_path)
    for _ in range(2):
        assert Runs("claim", options, {"a": (1,)}).do("one", work)["value"] == 3.0
    assert len(calls) == 1
    # of other settings
    Runs("claim", options, {"a": (2,)}).do("one", work)
    assert len(calls) == 2
    Runs("claim", Options(results=tmp_path, force=True), {"a": (2,)}).do("one", work)
    assert len(calls) == 3
    # a toy run leaves the others alone
    Runs("claim", Options(results=tmp_path, dry_run=True), {"a": (2,)}).do("one", work)
    assert len(calls) == 4
    Runs("claim", options, {"a": (2,)}).do("one", work)
    assert len(calls) == 4


def test_what_is_measured_again_is_kept_beside(tmp_path):
    for force, settings, value in ((False, {"a": 1}, 1.0), (False, {"a": 2}, 2.0), (True, {"a": 2}, 3.0)):
        runs = Runs("claim", Options(results=tmp_path, force=force), settings)
        runs.do("one", lambda value=value: {"value": value})
    for backup, value in (("bak", 1.0), ("bak1", 2.0)):
        before = json.loads((tmp_path / f"claim_laptop.json.{backup}").read_text(encoding="utf-8"))
        assert before["runs"]["one"]["value"] == value


def test_every_run_keeps_its_machine(tmp_path, monkeypatch, capsys):
    options = Options(results=tmp_path, command="first")
    here = {"processor": "old", "commit": "1" * 40}
    monkeypatch.setattr(reproduce_common, "describe_machine", lambda device: here)
    Runs("claim", options, {}).do("one", lambda: {"value": 1.0})
    here = {"processor": "new", "commit": "2" * 40}
    again = Runs("claim", options, {})
    assert "1 runs, made on old at commit 111111111" in capsys.readouterr().out
    for key in ("one", "two", "three"):
        again.do(key, lambda: {"value": 2.0})
    again.finish({})
    content = json.loads((tmp_path / "claim_laptop.json").read_text(encoding="utf-8"))
    made_on = {key: content["machines"][run["machine"]]["processor"] for key, run in content["runs"].items()}
    assert made_on == {"one": "old", "two": "new", "three": "new"}


def test_a_run_that_fails_leaves_the_others(tmp_path):
    options = Options(results=tmp_path)
    runs = Runs("claim", options, {})
    runs.do("one", lambda: {"value": 1.0})
    with pytest.raises(ZeroDivisionError):
        runs.do("two", lambda: {"value": 1 / 0})
    assert list(Runs("claim", options, {}).runs) == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["claim_laptop.json"]


def test_runs_of_another_claim_are_adopted_under_equal_settings(tmp_path):
    options = Options(results=tmp_path)
    other = Runs("accuracy", options, {"steps": 3})
    for key in ("one", "two"):
        other.do(key, lambda: {"value": 1.0})
    forced = Options(results=tmp_path, force=True)
    for how, settings, expected in ((options, 3, ["one", "two"]), (options, 4, []), (forced, 3, [])):
        runs = Runs("detach", how, {"steps": settings})
        runs.adopt("accuracy")
        assert list(runs.runs) == expected
    runs = Runs("detach", options, {"steps": 3})
    runs.adopt("accuracy")
    runs.do("two", lambda: {"value": 2.0})
    runs.finish({})
    assert len(runs.content["machines"]) == 1
    # what it rests on, and no more
    assert {key: run["value"] for key, run in runs.runs.items()} == {"two": 1.0}


def test_a_killed_run_leaves_the_summary(tmp_path):
    options = Options(results=tmp_path, command="first")
    runs = Runs("claim", options, {})
    runs.do("one", lambda: {"seed": 0})
    runs.finish({"cases": {"one": {}}})
    runs = Runs("claim", Options(results=tmp_path, command="second"), {})
    # and no more
    runs.do("two", lambda: {"seed": 1})
    content = json.loads(options.path("claim").read_text(encoding="utf-8"))
    assert (content["command"], content["seeds"], content["summary"]) == ("first", [0], {"cases": {"one": {}}})
    assert list(content["runs"]) == ["one", "two"]


def test_interval_holds_the_mean_as_often_as_it_says():
    torch.manual_seed(0)
    found = [interval(values.tolist()) for values in torch.randn(2000, 3, dtype=torch.float64)]
    assert sum(f["low"] < 0 < f["high"] for f in found) / len(found) == pytest.approx(0.95, abs=0.015)
    assert all(f["mean"] - f["low"] == pytest.approx(f["high"] - f["mean"]) for f in found)
    assert interval([2.0])["low"] == 2.0


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ({1.0: 0.3, 2.0: 0.1, 3.0: 0.2}, 2.0, False),
        ({1.0: 0.3, 2.0: 0.2, 3.0: 0.1}, 3.0, True),
        # whatever their order
        ({2.0: 0.2, 3.0: 0.3, 1.0: 0.4}, 2.0, False),
        ({1.0: float("nan"), 2.0: 0.4, 3.0: float("nan")}, 2.0, False),
        # of two, either is
        ({2.0: 0.1, 1.0: 0.4}, 2.0, True),
        ({1.0: 0.1}, 1.0, False),
    ],
)
def test_the_rate_of_the_lowest_validation_loss(losses, best, edge):
    assert lowest(losses)[0] == best
    assert at_edge(best, losses) is edge


def test_the_difference_is_paired_by_rank_and_seed():
    cases = {
        f"{method} {rank}": case(method, rank, *(rank + 0.1 * seed + gain for seed in (0, 1)))
        for method, gain in (("lora", 0.0), ("dora", 0.5), ("dora_not_detached", 0.75))
        for rank in (2, 8)
    }
    found = difference(cases, "t")
    assert found["count"] == 2
    assert found["mean"] == pytest.approx(0.5)
    # ranks and seeds differ, the gain does not
    assert found["low"] == pytest.approx(0.5)
    assert difference(cases, "t", ("dora", "dora_not_detached"))["mean"] == pytest.approx(-0.25)
    cases["dora 2"] = case("dora", 2, 2.6, 2.4)
    # ranks do not narrow it
    assert difference(cases, "t") == pytest.approx(interval([0.55, 0.4]))


def case(method, rank, *accuracies):
    mean = sum(accuracies) / len(accuracies)
    return {"task": "t", "method": method, "rank": rank, "accuracies": accuracies, "mean": mean, "spread": 0.01}
