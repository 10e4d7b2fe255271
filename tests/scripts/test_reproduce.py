"""`scripts/reproduce.py`: every claim at toy size, resuming, the rules of the verdicts, and the page."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from finetune_fixtures import make_llama, make_words, write_jsonl

import reproduce
from reproduction import accuracy as reproduce_accuracy
from reproduction import report as report
from reproduction import verdicts as verdicts
from reproduction.common import Options, Plan, Runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_llama(folder / "smollm2")
    for task in ("cmudict", "cities"):
        (folder / task).mkdir()
        write_jsonl(folder / task / "train.jsonl", make_words(20))
        write_jsonl(folder / task / "test.jsonl", make_words(30)[20:])
    return folder


@pytest.fixture(scope="module")
def accuracy_results(data, tmp_path_factory):
    """What `reproduce.py accuracy` stores, which other claims and further calls build on."""
    folder = tmp_path_factory.mktemp("accuracy")
    call("accuracy", data, folder)
    return folder


@pytest.fixture
def results(accuracy_results, tmp_path):
    """A copy of `accuracy_results`."""
    return shutil.copytree(accuracy_results, tmp_path / "results")


# One run of each kind.
FEW = ("--seeds", "0", "--ranks", "1")


def call(claim, data, results, *flags):
    reproduce.main([claim, "--dry_run", "--data", str(data), "--results", str(results), *flags])


def content_of(results, claim):
    return json.loads((results / f"{claim}_laptop_dry.json").read_text(encoding="utf-8"))


def test_the_same_value_twice_is_one(data, tmp_path):
    call("accuracy", data, tmp_path, "--seeds", "1", "1", "0", "--ranks", "1", "1")
    for found in content_of(tmp_path, "accuracy")["summary"]["cases"].values():
        assert len(found["accuracies"]) == 2


def test_a_small_grid_leaves_the_summary_of_a_larger_one(data, tmp_path, capsys):
    def grid(*flags):
        call("accuracy", data, tmp_path, *flags)
        content = content_of(tmp_path, "accuracy")
        return content["seeds"], sorted(content["summary"]["cases"]), content["command"]

    grid("--seeds", "1", "--ranks", "1")
    larger = grid("--seeds", "0", "1", "--ranks", "1", "2")
    assert larger[0] == [0, 1]
    assert "spelling dora r=2" in larger[1]
    for smaller in (["--seeds", "1", "--ranks", "1", "2"], ["--seeds", "0", "1", "--ranks", "2"]):
        capsys.readouterr()
        assert grid(*smaller) == larger
        printed = capsys.readouterr().out
        assert f"keeps the larger grid of `{larger[2]}`" in printed
        # what was asked for is printed all the same
        assert ("spelling dora r=1 " in printed) == ("1" in smaller[-2:])
    # no part of it
    other = grid("--seeds", "0", "--ranks", "3")
    assert other[1] == ["spelling dora r=3", "spelling full", "spelling lora r=3"]
    forced = grid("--seeds", "0", "--ranks", "1", "--force")
    assert (forced[0], len(content_of(tmp_path, "accuracy")["runs"])) == ([0], 4)


def test_accuracy(data, tmp_path, capsys):
    two_tasks = ("--tasks", "spelling", "cities", "--num_rates", "2", "--ranks", "1")
    call("accuracy", data, tmp_path, *two_tasks)
    content = content_of(tmp_path, "accuracy")
    runs = content["runs"]
    assert set(content["summary"]["gains"]) == {"spelling", "cities"}
    assert {(r["method"], r["rank"]) for r in runs.values() if r["method"] != "base"} == {
        ("lora", 1), ("dora", 1), ("full", 0),
    }  # fmt: skip
    # the announced number of runs is the number of runs, and each counts once
    places = re.findall(r"^\[(\d+)/(\d+)\]", capsys.readouterr().out, re.MULTILINE)
    assert places == [(str(i + 1), str(len(runs))) for i in range(len(runs))]
    for case in content["summary"]["cases"].values():
        assert len(case["accuracies"]) == 2
        losses = case["validation_loss_by_rate"]
        assert len(losses) == 2
        means = case["mean_validation_loss"]
        assert means[f"{case['rate']:g}"] == min(means.values())
    assert (tmp_path / "accuracy_laptop_dry.png").stat().st_size > 10000
    stamp = (tmp_path / "accuracy_laptop_dry.json").read_text(encoding="utf-8")
    # again: nothing is trained, and a larger grid keeps what there is
    call("accuracy", data, tmp_path, *two_tasks)
    assert json.loads(stamp)["runs"] == content_of(tmp_path, "accuracy")["runs"]
    call("accuracy", data, tmp_path, "--tasks", "spelling", "--num_rates", "2", "--ranks", "1", "2", "--seeds", "0")
    assert runs.items() < content_of(tmp_path, "accuracy")["runs"].items()


def test_the_rate_is_the_best_over_all_seeds_of_the_two_best_of_the_first(data, tmp_path, monkeypatch):
    """Rate 1 is the best of the first seed alone, and one run of it went astray; rate 3 is not tried again."""
    losses = {(1.0, 0): 0.1, (1.0, 1): 0.9, (2.0, 0): 0.2, (2.0, 1): 0.2, (3.0, 0): 0.3}
    found = lambda _, t: {"validation_loss": losses[t.rate, t.seed], "test_loss": t.rate, "accuracy": t.rate / 10}  # noqa: E731
    monkeypatch.setattr(reproduce_accuracy, "RATES", {"spelling": (1.0, 2.0, 3.0)})
    monkeypatch.setattr(reproduce_accuracy.Laboratory, "run", found)
    options = Options(data=data, dry_run=True, results=tmp_path)
    laboratory = reproduce_accuracy.Laboratory(
        options, dataclasses.replace(reproduce_accuracy.plan_of(options), num_rates=3, ranks=(2,))
    )
    runs = Runs("accuracy", options, laboratory.settings())
    case = reproduce_accuracy.train_all(runs, laboratory, ("lora",))["spelling lora r=2"]
    assert (case["rate"], case["edge"], case["accuracies"]) == (2.0, False, [0.2, 0.2])
    assert case["mean_validation_loss"] == pytest.approx({"1": 0.5, "2": 0.2})
    assert len(runs.runs) == 1 + 5


def test_runs_of_other_data_are_refused(data, results, tmp_path):
    here = shutil.copytree(data, tmp_path / "data")
    lines = (here / "cmudict" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (here / "cmudict" / "test.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    before = content_of(results, "accuracy")
    with pytest.raises(SystemExit):
        call("accuracy", here, results)
    assert content_of(results, "accuracy") == before
    call("accuracy", here, results, "--force", *FEW)


def test_more_rates_than_there_are(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("accuracy", data, tmp_path, "--num_rates", "6")
    assert "at most 5 rates" in capsys.readouterr().err


def test_an_answer_counts_where_generation_would_write_it(data):
    """Train a model on a few records until it knows some of them, and compare with greedy generation."""
    options = Options(data=data, dry_run=True)
    laboratory = reproduce_accuracy.Laboratory(
        options, Plan(steps=150, batch=8, num_train=12, num_validation=4, num_test=8)
    )
    model = laboratory.train(reproduce_accuracy.Trial("spelling", "full", 0, 2e-2, 0)).float()
    train, _, test = laboratory.data("spelling")
    right = []
    for records in (train, test):
        for record in records:
            start = record["labels"].index(next(label for label in record["labels"] if label != -100))
            prompt, answer = torch.tensor([record["input_ids"][:start]]), record["input_ids"][start:]
            found = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False
            )
            right.append(found[0, start:].tolist() == answer)
    both = [laboratory.measure(model, records, batch_size=5)[1] for records in (train, test)]
    assert 0 < sum(right) < len(right)
    assert both == [sum(right[:12]) / 12, sum(right[12:]) / 8]


def test_the_loss_is_that_of_the_model(data):
    options = Options(data=data, dry_run=True)
    laboratory = reproduce_accuracy.Laboratory(options, reproduce_accuracy.plan_of(options))
    records = laboratory.data("spelling")[0]
    losses, tokens = [], []
    for record in records:
        ids, labels = (torch.tensor([record[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            losses.append(laboratory.base(input_ids=ids, labels=labels).loss.item())
        tokens.append(int((labels != -100).sum()))
    expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert laboratory.measure(laboratory.base, records)[0] == pytest.approx(expected, rel=1e-5)


def test_training_leaves_the_base_alone(data):
    options = Options(data=data, dry_run=True)
    laboratory = reproduce_accuracy.Laboratory(options, reproduce_accuracy.plan_of(options))
    before = copy.deepcopy(laboratory.base.state_dict())
    for method, rank in (("full", 0), ("lora", 2), ("dora", 2)):
        first = laboratory.run(reproduce_accuracy.Trial("spelling", method, rank, 1e-2, 0))
        assert laboratory.run(reproduce_accuracy.Trial("spelling", method, rank, 1e-2, 0)) == first
    after = laboratory.base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in laboratory.base.parameters())


def test_missing_data_say_what_to_run(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("accuracy", tmp_path, tmp_path)
    assert "prepare_smollm2.py" in capsys.readouterr().err
    make_llama(tmp_path / "smollm2")
    with pytest.raises(SystemExit):
        call("accuracy", tmp_path, tmp_path)
    assert "prepare_cmudict.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("accuracy", data, tmp_path, "--tasks", "spelling", "spells")
    assert "expected tasks of spelling, cities, found 'spells'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("memory", data, tmp_path, "--ranks", "3")
    assert "--ranks is for accuracy and detach, not for memory" in capsys.readouterr().err
    for claim, flags, message in (
        ("vl_bart", ("--ranks", "3", "--seeds", "1"), "--ranks is for accuracy and detach, not for vl_bart"),
        ("memory", ("--seeds", "1"), "--seeds is for accuracy, detach and vl_bart, not for memory"),
        ("memory", ("--config", "a.yaml"), "--config is for vl_bart, not for memory"),
        ("vl_bart", ("--config", "none.yaml"), "none.yaml: no such file"),
        ("pattern", ("--model", "facebook/bart-base"), "--model is for vl_bart, not for pattern"),
    ):
        with pytest.raises(SystemExit):
            call(claim, data, tmp_path, *flags)
        assert message in capsys.readouterr().err


def test_detach(data, results):
    call("detach", data, results, "--ranks", "2")
    content, accuracy = content_of(results, "detach"), content_of(results, "accuracy")
    shared = [key for key in content["runs"] if key.startswith("spelling dora r=2")]
    assert shared
    assert all(content["runs"][key] == accuracy["runs"][key] for key in shared)
    assert {case["method"] for case in content["summary"]["cases"].values()} == {"dora", "dora_not_detached"}
    totals = content["summary"]["total_mib"]
    assert totals["reference"] < totals["reference_not_detached"]
    table = "\n".join(report.detail_detach(content))
    assert f"| DoRA, dense, norm detached | {totals['reference']:,.1f} |" in table
    assert "batch 2 x length 28, r=2" in table
    assert (results / "detach_laptop_dry.png").stat().st_size > 10000


def test_pattern(data, tmp_path):
    call("pattern", data, tmp_path)
    content = content_of(tmp_path, "pattern")
    for by_method in content["summary"]["correlations"].values():
        assert set(by_method) == {"full", "lora", "dora"}
        for found in by_method.values():
            assert -1 <= found["low"] <= found["r"] <= found["high"] <= 1
    points = [point for run in content["runs"].values() for point in run["history"]]
    assert {point["step"] for point in points} == {2, 4}
    assert all(point["direction"] > 0 for point in points if point["step"] == 4)
    assert len(list(tmp_path.glob("pattern_laptop*.png"))) == 3
    assert 0 < content["summary"]["share_of_recording"] < 1
    # each group is of its modules, and the last step is the last one
    for method in ("full", "lora", "dora"):
        mine = [p for run in content["runs"].values() if run["method"] == method for p in run["history"]]
        for name, chosen in (
            ("query projections", [p for p in mine if p["module"].endswith("q_proj")]),
            ("all linear layers", mine),
        ):
            last = [point for point in chosen if point["step"] == 4]
            for key, points in (("correlations", chosen), ("at_the_last_step", last)):
                found = content["summary"][key][name][method]
                changes = torch.tensor([[point["magnitude"], point["direction"]] for point in points])
                assert found["count"] == len(points)
                assert found["r"] == pytest.approx(torch.corrcoef(changes.double().T)[0, 1].item(), abs=1e-4)


@pytest.mark.parametrize("claim", ["accuracy", "detach"])
def test_a_dry_run_at_full_size_trains_the_small_model(claim, data, tmp_path):
    call(claim, data, tmp_path, "--size", "full", *FEW)
    content = json.loads((tmp_path / f"{claim}_full_dry.json").read_text(encoding="utf-8"))
    assert content["settings"]["model"] == "SmolLM2-135M-Instruct"


def test_page_of_toy_results_is_empty(data, results):
    """Results of a dry run are no results."""
    call("report", data, results)
    page = (results / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert page.count(f"**{verdicts.OPEN}**") == len(verdicts.ROWS)


def test_commands_of_the_docstring_exist():
    for line in reproduce.__doc__.splitlines():
        words = line.split("#")[0].split()
        if words[:2] == ["python", "scripts/reproduce.py"]:
            assert reproduce.build_parser().parse_args(words[2:]).claim in reproduce.CLAIMS
    for word in reproduce.__doc__.replace("`", " ").split():
        if word.startswith("scripts/"):
            assert (ROOT / word.rstrip(".,")).exists() or word.startswith("scripts/reproduce/")
