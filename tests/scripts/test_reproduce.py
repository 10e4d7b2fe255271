"""`scripts/reproduce.py`: every claim at toy size, resuming, the rules of the verdicts, and the page."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from finetune_fixtures import make_llama, make_words, write_jsonl

import reproduce
from reproduction import accuracy as reproduce_accuracy
from reproduction import common as reproduce_common
from reproduction import commonsense as reproduce_commonsense
from reproduction import report as report
from reproduction import verdicts as verdicts
from reproduction.common import RESULTS, Options, Plan, Runs, at_edge, difference, interval, lowest

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


def call(claim, data, results, *flags):
    reproduce.main([claim, "--dry_run", "--data", str(data), "--results", str(results), *flags])


def content_of(results, claim):
    return json.loads((results / f"{claim}_laptop_dry.json").read_text(encoding="utf-8"))


# ---- the file of runs


def test_runs_are_done_once(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"value": 3.0}

    options = Options(results=tmp_path)
    for _ in range(2):
        assert Runs("claim", options, {"a": (1,)}).do("one", work)["value"] == 3.0
    assert len(calls) == 1
    Runs("claim", options, {"a": (2,)}).do("one", work)  # of other settings
    assert len(calls) == 2
    Runs("claim", Options(results=tmp_path, force=True), {"a": (2,)}).do("one", work)
    assert len(calls) == 3
    # a toy run leaves the others alone
    Runs("claim", Options(results=tmp_path, dry_run=True), {"a": (2,)}).do("one", work)
    assert len(calls) == 4
    Runs("claim", options, {"a": (2,)}).do("one", work)
    assert len(calls) == 4


def test_what_is_measured_anew_is_kept_beside(tmp_path):
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
    assert {key: run["value"] for key, run in runs.runs.items()} == {"two": 1.0}  # what it rests on, and no more


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
        assert ("spelling dora r=1 " in printed) == ("1" in smaller[-2:])  # what was asked for is printed all the same
    other = grid("--seeds", "0", "--ranks", "3")  # no part of it
    assert other[1] == ["spelling dora r=3", "spelling full", "spelling lora r=3"]
    forced = grid("--seeds", "0", "--ranks", "1", "--force")
    assert (forced[0], len(content_of(tmp_path, "accuracy")["runs"])) == ([0], 4)


def test_a_killed_run_leaves_the_summary(tmp_path):
    options = Options(results=tmp_path, command="first")
    runs = Runs("claim", options, {})
    runs.do("one", lambda: {"seed": 0})
    runs.finish({"cases": {"one": {}}})
    runs = Runs("claim", Options(results=tmp_path, command="second"), {})
    runs.do("two", lambda: {"seed": 1})  # and no more
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
        ({2.0: 0.2, 3.0: 0.3, 1.0: 0.4}, 2.0, False),  # whatever their order
        ({1.0: float("nan"), 2.0: 0.4, 3.0: float("nan")}, 2.0, False),
        ({2.0: 0.1, 1.0: 0.4}, 2.0, True),  # of two, either is
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
    assert found["low"] == pytest.approx(0.5)  # ranks and seeds differ, the gain does not
    assert difference(cases, "t", ("dora", "dora_not_detached"))["mean"] == pytest.approx(-0.25)
    cases["dora 2"] = case("dora", 2, 2.6, 2.4)
    assert difference(cases, "t") == pytest.approx(interval([0.55, 0.4]))  # ranks do not narrow it


# ---- accuracy


def test_accuracy(data, tmp_path, capsys):
    call("accuracy", data, tmp_path, "--tasks", "spelling", "cities", "--num_rates", "2")
    content = content_of(tmp_path, "accuracy")
    runs = content["runs"]
    assert set(content["summary"]["gains"]) == {"spelling", "cities"}
    assert {(r["method"], r["rank"]) for r in runs.values() if r["method"] != "base"} == {
        ("lora", 1), ("lora", 2), ("dora", 1), ("dora", 2), ("full", 0),
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
    call("accuracy", data, tmp_path, "--tasks", "spelling", "cities", "--num_rates", "2")
    assert json.loads(stamp)["runs"] == content_of(tmp_path, "accuracy")["runs"]
    call("accuracy", data, tmp_path, "--tasks", "spelling", "--ranks", "1", "2", "3")
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


def test_runs_of_other_data_are_refused(data, tmp_path):
    here = shutil.copytree(data, tmp_path / "data")
    call("accuracy", here, tmp_path / "results")
    lines = (here / "cmudict" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (here / "cmudict" / "test.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    before = content_of(tmp_path / "results", "accuracy")
    with pytest.raises(SystemExit):
        call("accuracy", here, tmp_path / "results")
    assert content_of(tmp_path / "results", "accuracy") == before
    call("accuracy", here, tmp_path / "results", "--force")


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


def test_detach(data, tmp_path):
    call("accuracy", data, tmp_path)
    call("detach", data, tmp_path)
    content, accuracy = content_of(tmp_path, "detach"), content_of(tmp_path, "accuracy")
    shared = [key for key in content["runs"] if key.startswith("spelling dora r=2")]
    assert shared
    assert all(content["runs"][key] == accuracy["runs"][key] for key in shared)
    assert {case["method"] for case in content["summary"]["cases"].values()} == {"dora", "dora_not_detached"}
    totals = content["summary"]["total_mib"]
    assert totals["reference"] < totals["reference_not_detached"]
    table = "\n".join(report.detail_detach(content))
    assert f"| DoRA, dense, norm detached | {totals['reference']:,.1f} |" in table
    assert "batch 2 x length 28, r=2" in table
    assert (tmp_path / "detach_laptop_dry.png").stat().st_size > 10000


# ---- pattern


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


# ---- commonsense, by the scripts themselves


def test_commonsense(data, tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    settings = {
        "model_name_or_path": str(data / "smollm2"), "dtype": "float32", "r": 2, "lora_alpha": 4,
        "format": "instruction", "dataset": "replaced", "output_dir": "replaced", "max_length": 256, "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2, "dropout_mode": "branch",
    }  # fmt: skip
    (folder / "llama_7b_r32.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(reproduce_commonsense, "CONFIGS", folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tests = tmp_path / "commonsense" / "test"
    tests.mkdir(parents=True)
    record = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "commonsense" / "train.json").write_text(json.dumps([record] * 4), encoding="utf-8")
    answers = ("true", "solution1", "answer1", "ending1", "option1", "answer1", "answer1", "answer1")
    names = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
    for name, answer in zip(names, answers, strict=True):
        fitting = record | {"answer": answer, "output": f"the correct answer is {answer}"}
        (tests / f"{name}.json").write_text(json.dumps([fitting]), encoding="utf-8")
    options, plan = Options(size="full", data=tmp_path, results=tmp_path / "results"), Plan(ranks=(3,), seeds=(0,))
    reproduce_commonsense.run(options, plan)
    content = json.loads((tmp_path / "results/accuracy_full.json").read_text(encoding="utf-8"))
    assert set(content["runs"]) == {"commonsense lora r=3 seed=0", "commonsense dora r=3 seed=0"}
    assert all(set(run["tasks"]) == set(names) for run in content["runs"].values())
    (config,) = tmp_path.glob("outputs/reproduce/commonsense_dora_r3_seed0_*/adapter_config.json")
    assert json.loads(config.read_text(encoding="utf-8"))["r"] == 3
    # the cost of detaching asks for the memory before it trains anything
    with pytest.raises(ValueError, match=r"memory_full\.json: not there yet"):
        reproduce_commonsense.run_detach(options, plan)
    totals = {"reference": 1.0, "dora": 1.0, "dora_not_detached": 1.0}
    memory = {"summary": {"llama": {"setting": "16 x 256", "total_mib": {"16 x 256": totals}}}}
    options.path("memory").write_text(json.dumps(memory), encoding="utf-8")
    with pytest.raises(ValueError, match="at 16 x 256, found none of reference_not_detached, which did not fit"):
        reproduce_commonsense.run_detach(options, plan)
    totals["reference_not_detached"] = 2.0
    options.path("memory").write_text(json.dumps(memory), encoding="utf-8")
    reproduce_commonsense.run_detach(options, plan)
    content = json.loads((tmp_path / "results/detach_full.json").read_text(encoding="utf-8"))
    assert content["runs"].keys() == {f"commonsense {method} r=3 seed=0" for method in ("dora", "dora_not_detached")}
    assert content["summary"]["total_mib"] == totals
    (config,) = tmp_path.glob("outputs/reproduce/commonsense_dora_not_detached_r3_seed0_*/adapter_config.json")
    assert '"detach_norm": false' in config.read_text(encoding="utf-8")
    # other data or another configuration are other runs
    with (tests / "boolq.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="expected runs of the model and data with digest"):
        reproduce_commonsense.run(options, plan)
    settings = reproduce_commonsense.settings_of(options, plan)
    (folder / "llama_7b_r32.yaml").write_text(yaml.safe_dump(settings | {"r": 4}), encoding="utf-8")
    assert reproduce_commonsense.settings_of(options, plan) != settings


@pytest.mark.parametrize("claim", ["accuracy", "detach"])
def test_a_dry_run_at_full_size_trains_the_small_model(claim, data, tmp_path):
    call(claim, data, tmp_path, "--size", "full")
    content = json.loads((tmp_path / f"{claim}_full_dry.json").read_text(encoding="utf-8"))
    assert content["settings"]["model"] == "SmolLM2-135M-Instruct"


# ---- the page


def case(method, rank, *accuracies):
    mean = sum(accuracies) / len(accuracies)
    return {"task": "t", "method": method, "rank": rank, "accuracies": accuracies, "mean": mean, "spread": 0.01}


def spread_of(low, high):
    return {"mean": (low + high) / 2, "low": low, "high": high, "count": 9}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.1, verdicts.YES),  # beats
        (-0.005, 0.005, verdicts.YES),  # matches
        (-0.02, 0.1, verdicts.NO),  # no proof of either
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
        (LOW, FLAT, FLAT, verdicts.PARTLY),  # on one of two tasks
        (LOW, LOW, FLAT, verdicts.NO),  # a gain, but none that falls
        (FLAT, FLAT, FLAT, verdicts.NO),
        ((0.3, 0.0, 0.0), FLAT, FLAT, verdicts.NO),  # nothing that one seed could have brought
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
    assert verdicts.judge_low_rank({"accuracy": content})[1] == verdicts.OPEN  # one rank is neither low nor high


@pytest.mark.parametrize(
    ("low", "high", "pictures", "verdict"),
    [
        (-0.005, 0.002, None, verdicts.YES),
        (0.02, 0.03, None, verdicts.YES),  # a gain is no loss
        (-0.1, 0.001, None, verdicts.NO),  # a wide interval that holds 0 is no proof
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
        ((0.001, 0.01), (-0.05, -0.02), 0.8, verdicts.PARTLY, verdicts.YES),  # as the paper's own videos
        ((-0.01, 0.01), (-0.005, 0.01), 0.8, verdicts.PARTLY, verdicts.NO),
        ((-0.01, 0.01), (-0.05, 0.01), 0.8, verdicts.NO, verdicts.NO),  # no proof of either
        ((-0.02, -0.01), (-0.005, 0.01), 0.8, verdicts.NO, verdicts.NO),
        ((0.001, 0.01), (-0.005, 0.01), 0.35, verdicts.NO, verdicts.NO),  # as good with another's picture
        ((0.001, 0.01), (-0.005, 0.01), 0.2, verdicts.NO, verdicts.NO),  # below who never looks
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


def test_page_of_toy_results_is_empty(data, tmp_path):
    """Results of a dry run are no results."""
    call("accuracy", data, tmp_path / "results")
    call("report", data, tmp_path / "results")
    page = (tmp_path / "results" / "REPRODUCTION.md").read_text(encoding="utf-8")
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


def test_commands_of_the_docstring_exist():
    for line in reproduce.__doc__.splitlines():
        words = line.split("#")[0].split()
        if words[:2] == ["python", "scripts/reproduce.py"]:
            assert reproduce.build_parser().parse_args(words[2:]).claim in reproduce.CLAIMS
    for word in reproduce.__doc__.replace("`", " ").split():
        if word.startswith("scripts/"):
            assert (ROOT / word.rstrip(".,")).exists() or word.startswith("scripts/reproduce/")
