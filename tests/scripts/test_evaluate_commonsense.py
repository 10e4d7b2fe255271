"""Evaluation on the commonsense tasks: accuracies, resuming, refusals, and all from the download to the table."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commonsense_fixtures import make_record, write_list
from finetune_fixtures import make_config, make_llama

import evaluate_commonsense
import finetune_llama
import prepare_commonsense
from finetune import generation
from prepare.commonsense import TASKS, build_prompt

Refused = Callable[[str], contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default output folders of the scripts lie in a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def question_sets(tmp_path: Path) -> Path:
    """Four records of every task, half of which have its first answer."""
    for task in TASKS:
        write_list(tmp_path / "sets" / f"{task}.json", [make_record(task, number) for number in range(4)])
    return tmp_path / "sets"


class Oracle:
    """Stands in for generation: answers as `responses` says, and notes the questions that it was asked."""

    def __init__(self, responses: dict[str, list[str]]) -> None:
        self.responses = responses
        self.asked: list[str] = []

    def __call__(self, model: Any, tokenizer: Any, prompts: list[str], batch_size: int, max_tokens: int) -> list[str]:
        by_prompt = {
            build_prompt(make_record(task, number)["instruction"]): (task, response)
            for task, responses in self.responses.items()
            for number, response in enumerate(responses)
        }
        self.asked += [by_prompt[prompt][0] for prompt in prompts]
        return [by_prompt[prompt][1] for prompt in prompts]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """A model that always gives the first answer, right for half of the records, but for boolq, where it knows all."""
    first = {task: [f"the correct answer is {answers[0]}"] * 4 for task, answers in TASKS.items()}
    replies = Oracle(first | {"boolq": ["true", "false", "true", "false"], "winogrande": ["option1", "", "True", "no"]})
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    monkeypatch.setattr(evaluate_commonsense, "load_model", lambda *names: (model, None))
    monkeypatch.setattr(evaluate_commonsense, "generate_answers", replies)
    return replies


def evaluate(question_sets: Path, *flags: object, model: str = "llama-7b-hf") -> dict[str, Any]:
    arguments = ["--model_name_or_path", model, "--data", question_sets, "--json", "result.json", *flags]
    evaluate_commonsense.main([str(argument) for argument in arguments])
    return json.loads(Path("result.json").read_text(encoding="utf-8"))


def test_accuracy_per_task_and_their_mean(
    oracle: Oracle, question_sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(question_sets)
    accuracies = {task: result["accuracy"] for task, result in results["tasks"].items()}
    assert accuracies == dict.fromkeys(TASKS, 0.5) | {"boolq": 1.0, "winogrande": 0.25}
    assert results["tasks"]["winogrande"]["num_unread"] == 3
    assert results["summary"] == {"mean_accuracy": (1.0 + 0.25 + 6 * 0.5) / 8, "num_tasks": 8, "is_complete": True}
    found = [answer["found"] for answer in results["tasks"]["boolq"]["answers"]]
    assert found == [answer["expected"] for answer in results["tasks"]["boolq"]["answers"]]
    table = capsys.readouterr().out.splitlines()[-11:]
    assert table[-1] == "wrote result.json"
    assert table[0].split("  ")[-2:] == ["paper, LoRA r=32", "paper, DoRA r=32"]
    assert [line.split()[0] for line in table[1:9]] == list(TASKS)
    assert table[1].split() == ["boolq", "100.0%", "68.9%", "69.7%"]
    assert table[9].split() == ["mean", "of", "8", "53.1%", "74.7%", "78.4%"]


def test_mean_does_not_weigh_tasks_by_their_size(oracle: Oracle, question_sets: Path) -> None:
    write_list(question_sets / "piqa.json", [make_record("piqa", 0)])
    summary = evaluate(question_sets, "--tasks", "piqa", "boolq", "winogrande")["summary"]
    assert summary == {"mean_accuracy": (1 + 1 + 0.25) / 3, "num_tasks": 3, "is_complete": False}


@pytest.mark.parametrize("flags", [["--tasks", "boolq"], ["--limit", "3"]])
def test_a_selection_is_not_comparable_with_the_paper(
    oracle: Oracle, question_sets: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not evaluate(question_sets, *flags)["summary"]["is_complete"]
    assert "not comparable" in capsys.readouterr().out
    evaluate(question_sets, *flags, "--restart", model="another")
    assert "paper" not in capsys.readouterr().out


def test_a_killed_run_goes_on_after_its_last_task(oracle: Oracle, question_sets: Path) -> None:
    responses = oracle.responses.pop("hellaswag")
    with pytest.raises(KeyError):
        evaluate(question_sets)
    stored = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert list(stored["tasks"]) == ["boolq", "piqa", "social_i_qa"]
    oracle.responses["hellaswag"], oracle.asked = responses, []
    results = evaluate(question_sets, "--batch_size", 2)
    assert list(dict.fromkeys(oracle.asked)) == [task for task in TASKS if task not in stored["tasks"]]
    assert results["summary"]["is_complete"]
    assert results["tasks"]["boolq"] == stored["tasks"]["boolq"]


def test_a_changed_test_set_is_measured_again(oracle: Oracle, question_sets: Path) -> None:
    evaluate(question_sets)
    oracle.asked = []
    write_list(question_sets / "piqa.json", [make_record("piqa", number) for number in (1, 3)])
    results = evaluate(question_sets)
    assert oracle.asked == ["piqa", "piqa"]
    assert results["tasks"]["piqa"]["accuracy"] == 0


def test_results_of_other_settings_are_not_mixed(
    oracle: Oracle, question_sets: Path, tmp_path: Path, refused: Refused
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"first")
    evaluate(question_sets, "--adapter", adapter)
    with refused(r"other settings: limit found None, expected 2\. Give another file"):
        evaluate(question_sets, "--adapter", adapter, "--limit", 2)
    (adapter / "adapter_model.safetensors").write_bytes(b"trained again")
    with refused(r"result\.json: holds results of other settings: adapter_files found"):
        evaluate(question_sets, "--adapter", adapter)
    oracle.asked = []
    evaluate(question_sets, "--adapter", adapter, "--restart", "--tasks", "piqa")
    assert oracle.asked == ["piqa"] * 4
    write_list(Path("result.json"), [1])
    with refused(r"result\.json: expected results of this script"):
        evaluate(question_sets)


def test_missing_and_wrong_question_sets_are_named(oracle: Oracle, question_sets: Path, refused: Refused) -> None:
    write_list(question_sets / "boolq.json", [make_record("boolq"), make_record("piqa")])
    with refused(r"boolq\.json, record 2: expected one of the answers false, true"):
        evaluate(question_sets)
    (question_sets / "boolq.json").unlink()
    (question_sets / "ARC-Easy.json").unlink()
    with refused(r"missing boolq, ARC-Easy\. Run `python scripts/prepare_commonsense\.py`"):
        evaluate(question_sets)
    assert oracle.asked == []


def test_batched_answers_are_those_of_one_by_one(tmp_path: Path) -> None:
    records = [make_record("piqa", number) for number in range(5)]
    assert len({len(build_prompt(record["instruction"])) for record in records}) == 5
    model, tokenizer = generation.load_model(str(make_llama(tmp_path / "model")), None, None)
    assert tokenizer.padding_side == "left"
    # Answers of random weights hang on every token only if the weights are large.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    batched, single = (
        evaluate_commonsense.evaluate_task(model, tokenizer, "piqa", records, size, 8)["answers"] for size in (5, 1)
    )
    assert batched == single
    assert len({answer["response"] for answer in single}) > 1


@pytest.mark.parametrize("method", ["dora", "lora", "peft_dora"])
def test_from_the_download_to_the_table(
    download: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_commonsense.main([str(download)])
    config = make_config(tmp_path, eval_dataset=None, learning_rate=0.05)
    data = ["--dataset", "data/commonsense/train.json", "--max_length", "512"]
    finetune_llama.main([str(config), "--method", method, *data])
    selection = ["--model_name_or_path", "model", "--tasks", "boolq", "ARC-Easy", "--limit", "2"]
    evaluate_commonsense.main([*selection, "--adapter", "out"])
    evaluate_commonsense.main(selection)
    adapted, plain = (
        json.loads(Path(f"outputs/commonsense/{name}.json").read_text(encoding="utf-8")) for name in ("out", "model")
    )
    assert adapted["adapter"] == {"method": "LoRA" if method == "lora" else "DoRA", "r": 2}
    assert plain["adapter"] is None
    assert {task: result["num_records"] for task, result in adapted["tasks"].items()} == {"boolq": 2, "ARC-Easy": 2}
    for answer, plain_answer in zip(
        adapted["tasks"]["boolq"]["answers"], plain["tasks"]["boolq"]["answers"], strict=True
    ):
        assert len(answer["response"]) <= 32
        assert answer["response"] != plain_answer["response"]
    assert "mean of 2" in capsys.readouterr().out
