"""The command for many examples: what it stores, and when it fails."""

import json
from collections import Counter

import pytest
from runner import Report, names

# scripts/search.py
import search

pytestmark = pytest.mark.cached_norms


def report(**changes):
    whole = Report(10_000, Counter(dict.fromkeys(names(), search.LEAST)), Counter({"silu": 5}))
    for name, value in changes.items():
        setattr(whole, name, value)
    return whole


def test_two_examples_are_stored(tmp_path, capsys):
    path = tmp_path / "results" / "search.json"
    search.main(["--examples", "2", "--seed", "3", "--output", str(path)])
    stored = json.loads(path.read_text())
    assert stored["examples"] == 2
    assert stored["seed"] == 3
    assert stored["operations"]
    assert {"torch", "peft", "hypothesis", "dora_peft"} <= stored["versions"].keys()
    assert {"commit", "modified", "seconds", "disagreements", "consumers"} <= stored.keys()
    assert [p.name for p in path.parent.iterdir()] == ["search.json"]
    assert "2 examples" in capsys.readouterr().out


def test_the_default_is_ten_thousand():
    options = search.parse([])
    assert options.examples == 10_000
    assert options.output.parts[-3:] == ("scripts", "search_results", "search.json")


def test_a_whole_run_without_disagreements_is_fine():
    assert search.problems(report()) == []


def test_every_operation_has_to_run_often_enough():
    few = report()
    few.operations["merge"] = search.LEAST - 1
    assert search.problems(few) == [f"merge ran {search.LEAST - 1} times only"]
    few.examples = 50
    assert search.problems(few) == []


def test_a_disagreement_has_to_be_explained(monkeypatch):
    found = report(kinds=Counter({"merged: output off": 3}), minimal={"merged: output off": "model()"})
    assert search.problems(found) == ["merged: output off (3 times): model()"]
    monkeypatch.setitem(search.EXPLAINED, "merged: output off", "rounding")
    assert search.problems(found) == []
    assert search.result(found, 0)["disagreements"][0]["explanation"] == "rounding"


def test_too_many_disagree_even_if_explained(monkeypatch):
    found = report(kinds=Counter({"merged: output off": 10}), minimal={"merged: output off": "model()"})
    monkeypatch.setitem(search.EXPLAINED, "merged: output off", "rounding")
    assert search.problems(found) == ["10 of 10000 examples disagree"]
