"""The rules of the verdicts, and the page that is made of the stored results."""

import json

import pytest

import reproduce
from reproduction import report as report
from reproduction import verdicts as verdicts
from reproduction.common import RESULTS


def case(method, rank, *accuracies):
    mean = sum(accuracies) / len(accuracies)
    return {"task": "t", "method": method, "rank": rank, "accuracies": accuracies, "mean": mean, "spread": 0.01}


def spread_of(low, high):
    return {"mean": (low + high) / 2, "low": low, "high": high, "count": 9}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        # beats
        (0.01, 0.1, verdicts.YES),
        # matches
        (-0.005, 0.005, verdicts.YES),
        # no proof of either
        (-0.02, 0.1, verdicts.NO),
        (-0.05, -0.001, verdicts.NO),
    ],
)
def test_verdict_on_the_gain(low, high, verdict):
    gains = {"t": spread_of(low, high)}
    content = {"summary": {"gains": gains, "cases": {"full": case("full", 0, 0.5)}}, "seeds": [0, 1, 2]}
    assert verdicts.judge_gain({"accuracy": content})[1] == verdict
    gains["other"] = spread_of(0.05, 0.2)
    assert verdicts.judge_gain({"accuracy": content})[1] == (
        verdicts.YES if verdict == verdicts.YES else verdicts.PARTLY
    )
    assert verdicts.judge_gain({"accuracy": content | {"seeds": [0, 1]}})[1] == verdicts.OPEN


LOW, FLAT = (0.3, 0.31, 0.29), (0.0, 0.01, -0.01)


@pytest.mark.parametrize(
    ("at_low", "at_high", "other", "verdict"),
    [
        (LOW, FLAT, LOW, verdicts.YES),
        # on one of two tasks
        (LOW, FLAT, FLAT, verdicts.PARTLY),
        # a gain, but none that falls
        (LOW, LOW, FLAT, verdicts.NO),
        (FLAT, FLAT, FLAT, verdicts.NO),
        # nothing that one seed could have brought
        ((0.3, 0.0, 0.0), FLAT, FLAT, verdicts.NO),
    ],
)
def test_verdict_on_low_ranks(at_low, at_high, other, verdict):
    cases = {}
    for task, gains in (("t", {2: at_low, 32: at_high}), ("other", {2: other, 32: FLAT})):
        for rank, gain in gains.items():
            cases[f"{task} lora {rank}"] = case("lora", rank, 0.4, 0.4, 0.4) | {"task": task}
            cases[f"{task} dora {rank}"] = case("dora", rank, *(0.4 + g for g in gain)) | {"task": task}
    content = {"summary": {"gains": {"t": {}, "other": {}}, "cases": cases}, "seeds": [0, 1, 2]}
    assert verdicts.judge_low_rank({"accuracy": content})[1] == verdict
    fewer = {name: found for name, found in cases.items() if found["rank"] == 2}
    content["summary"]["cases"] = fewer
    # one rank is neither low nor high
    assert verdicts.judge_low_rank({"accuracy": content})[1] == verdicts.OPEN


@pytest.mark.parametrize(
    ("low", "high", "pictures", "verdict"),
    [
        (-0.005, 0.002, None, verdicts.YES),
        # a gain is no loss
        (0.02, 0.03, None, verdicts.YES),
        # a wide interval that holds 0 is no proof
        (-0.1, 0.001, None, verdicts.NO),
        (-0.1, -0.02, None, verdicts.NO),
        (-0.005, 0.002, (-0.03, -0.02), verdicts.PARTLY),
        (-0.1, 0.001, (-0.005, 0.002), verdicts.PARTLY),
    ],
)
def test_verdict_on_detaching(low, high, pictures, verdict):
    totals = {"reference": 8.0, "reference_not_detached": 10.0, "dora": 7.0, "dora_not_detached": 7.0}
    summary = {"differences": {"t": spread_of(low, high)}, "total_mib": totals}
    contents = {"detach": {"summary": summary, "seeds": [0, 1, 2]}}
    if pictures is not None:
        found = {"differences": {"dora - dora_not_detached": spread_of(*pictures)}}
        contents["vl_bart"] = {"summary": found, "seeds": [0, 1, 2]}
    figure, found = verdicts.judge_detach(contents)
    assert found == verdict
    assert "dense algorithm 20.0 %, on ours 0.0 %" in figure
    contents["detach"]["seeds"] = [0]
    assert verdicts.judge_detach(contents)[1] == verdicts.OPEN


@pytest.mark.parametrize(
    ("gain", "to_full", "dora", "verdict", "of_videos"),
    [
        ((0.001, 0.01), (-0.005, 0.01), 0.8, verdicts.YES, verdicts.YES),
        # as the paper's own videos
        ((0.001, 0.01), (-0.05, -0.02), 0.8, verdicts.PARTLY, verdicts.YES),
        ((-0.01, 0.01), (-0.005, 0.01), 0.8, verdicts.PARTLY, verdicts.NO),
        # no proof of either
        ((-0.01, 0.01), (-0.05, 0.01), 0.8, verdicts.NO, verdicts.NO),
        ((-0.02, -0.01), (-0.005, 0.01), 0.8, verdicts.NO, verdicts.NO),
        # as good with another's picture
        ((0.001, 0.01), (-0.005, 0.01), 0.35, verdicts.NO, verdicts.NO),
        # below who never looks
        ((0.001, 0.01), (-0.005, 0.01), 0.2, verdicts.NO, verdicts.NO),
    ],
)
def test_verdict_on_vl_bart(gain, to_full, dora, verdict, of_videos):
    summary = {
        "methods": {"lora": {"mean": 0.7}, "dora": {"mean": dora, "swapped": 0.4}, "full": {"mean": 0.8}},
        "differences": {"dora - lora": spread_of(*gain), "dora - full": spread_of(*to_full)},
        "question_only": 0.3,
    }
    for claim, expected in (("vl_bart", verdict), ("vl_bart_video", of_videos)):
        assert verdicts.judge_vl_bart(claim)({claim: {"summary": summary, "seeds": [0, 1, 2]}})[1] == expected
        assert verdicts.judge_vl_bart(claim)({claim: {"summary": summary, "seeds": [0, 1]}})[1] == verdicts.OPEN


@pytest.mark.parametrize(
    ("measured", "by_setting", "verdict"),
    [
        (23.0, {}, verdicts.YES),
        (13.0, {}, verdicts.PARTLY),
        (8.0, {}, verdicts.NO),
        (8.0, {"x": 22.0}, verdicts.PARTLY),
    ],
)
def test_verdict_on_memory(measured, by_setting, verdict):
    found = {
        "saving_percent": {"reference": measured, "dora": 0.1}, "paper_percent": 24.4,
        "saved_mib": {"measured": 2.0, "predicted": 3.0}, "saved_gb": {"at_full_size": 4.0, "paper": 9.1},
        "saving_percent_by_setting": {"first": measured, **by_setting}, "ours_to_lora": 1.0,
        "ours_paper_dropout_to_lora": 1.3,
    }  # fmt: skip
    text, found_verdict = verdicts.judge_memory("llama")({"memory": {"summary": {"llama": found}}})
    assert found_verdict == verdict
    assert "2.00 MiB (predicted from shapes 3.00 MiB, for the real model 4.00 GB, paper 9.1 GB)" in text


@pytest.mark.parametrize(
    ("full", "lora", "dora", "verdict"),
    [
        ((-0.6, -0.4), (0.6, 0.8), (-0.4, -0.1), verdicts.YES),
        ((-0.6, 0.4), (0.6, 0.8), (-0.4, 0.1), verdicts.PARTLY),
        ((0.4, 0.6), (0.6, 0.8), (0.9, 0.95), verdicts.NO),
        ((0.4, 0.6), (-0.6, -0.4), (0.1, 0.2), verdicts.NO),
    ],
)
def test_verdict_on_the_pattern(full, lora, dora, verdict):
    limits = {"full": full, "lora": lora, "dora": dora}
    found = {m: {"r": (low + high) / 2, "low": low, "high": high, "count": 9} for m, (low, high) in limits.items()}
    paper = {"full": -0.62, "lora": 0.83, "dora": -0.31}
    content = {"summary": {"correlations": {"query projections": found}, "paper": paper}}
    assert verdicts.judge_pattern({"pattern": content})[1] == verdict


def test_page_says_what_is_missing(tmp_path):
    page = report.page(tmp_path)
    assert page.count(f"**{verdicts.OPEN}**") == len(verdicts.ROWS)


def test_the_stored_page_is_the_generated_one():
    assert (RESULTS.parent / "REPRODUCTION.md").read_text(encoding="utf-8") == report.page(RESULTS)
    assert not list(RESULTS.glob("*_dry.json"))


def test_stored_results_suffice_for_a_verdict():
    contents = report.load(RESULTS, "laptop")
    assert set(contents) == set(reproduce.CLAIMS) - {"report"}
    for claim, content in contents.items():
        assert claim == "memory" or len(content["seeds"]) >= verdicts.MIN_SEEDS
        assert not any(machine["modified"] for machine in content["machines"]), f"{claim} was not run from a commit"
        assert {run["machine"] for run in content["runs"].values()} == set(range(len(content["machines"])))
        assert len(content["machines"]) == len({json.dumps(machine) for machine in content["machines"]})
        assert list(RESULTS.glob(f"{claim}_laptop*.png"))
    pictures = contents["vl_bart"]["summary"]
    assert min(method["mean"] for method in pictures["methods"].values()) > pictures["question_only"]
