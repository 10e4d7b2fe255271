"""The commonsense pipeline on small local files: answers, preparation, evaluation, and all with a fine-tune run."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from finetune_fixtures import make_config, make_llama, make_tokenizer

import evaluate_commonsense
import finetune_llama
import prepare_commonsense
from finetune import generation
from finetune.data import IGNORE, encode_record
from prepare import commonsense
from prepare.commonsense import MARKER, TASKS, build_prompt, extract_answer

SCRIPTS = Path(__file__).parents[2] / "scripts"
Refused = Callable[[str], contextlib.AbstractContextManager[None]]
EVERY_ANSWER = [(task, answer) for task, answers in TASKS.items() for answer in answers]


@pytest.fixture(autouse=True)
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and the cache and the default output folder of the scripts in a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """That a command ends with an error that matches a pattern, and without a traceback."""

    @contextlib.contextmanager
    def check(pattern: str) -> Iterator[None]:
        with pytest.raises(SystemExit):
            yield
        assert re.search(f"error: .*{pattern}", capsys.readouterr().err)

    return check


def make_record(task: str, number: int = 0) -> dict[str, str]:
    answer = TASKS[task][number % 2]
    question = f"Choose: {'x' * (number % 5)} {task} {number}?\n\nAnswer format: {'/'.join(TASKS[task])}"
    return {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def write_list(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """A folder as LLM-Adapters lays its data out, 6 training records and 3 test records per task."""
    folder = tmp_path / "LLM-Adapters"
    train = [make_record(task, number) for number in range(10, 16) for task in TASKS]
    write_list(folder / "ft-training_set" / "commonsense_170k.json", train)
    for task in TASKS:
        write_list(folder / "dataset" / task / "test.json", [make_record(task, number) for number in range(3)])
    return folder


@pytest.fixture
def question_sets(tmp_path: Path) -> Path:
    """Four records of every task, half of which have its first answer."""
    for task in TASKS:
        write_list(tmp_path / "sets" / f"{task}.json", [make_record(task, number) for number in range(4)])
    return tmp_path / "sets"


def test_tasks_are_the_papers_in_its_order() -> None:
    order = "boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa"
    assert " ".join(TASKS) == order


def test_prompt_is_the_text_that_training_puts_before_the_answer() -> None:
    record, tokenizer = make_record("piqa"), make_tokenizer()
    encoded = encode_record(record, 0, source="file", kind="instruction", tokenizer=tokenizer, max_length=512)
    answer_start = next(place for place, label in enumerate(encoded["labels"]) if label != IGNORE)
    assert encoded["input_ids"][:answer_start] == tokenizer(build_prompt(record["instruction"]))["input_ids"]
    assert build_prompt("Why?").endswith("### Instruction:\nWhy?\n\n### Response:\n")
    assert "### Input" not in build_prompt("Why?")


@pytest.mark.parametrize(("task", "answer"), EVERY_ANSWER)
def test_every_answer_is_read(task: str, answer: str) -> None:
    prompt = build_prompt(make_record(task)["instruction"])
    assert extract_answer(task, f"{prompt}the correct answer is {answer}") == answer
    assert extract_answer(task, f"{prompt} \n{answer}.") == answer
    assert extract_answer(task, f"{prompt}{answer}, not {TASKS[task][0]} or {TASKS[task][1]}") == answer


@pytest.mark.parametrize(
    ("task", "response"),
    [
        ("boolq", ""),
        ("boolq", "the correct answer is yes"),
        ("boolq", "True"),  # learnt in small letters, and read so by the paper's evaluation
        ("piqa", "the correct answer is option1"),
        ("piqa", "solution3"),
        ("winogrande", "solution1"),
        ("hellaswag", "answer1 ending5 ending 1"),
        ("openbookqa", "answer6"),
        ("ARC-Easy", "the correct answer is ending2"),
        ("social_i_qa", f"I do not know.\n\n{MARKER}\nanswer1"),  # of another question, which the model made up
    ],
)
def test_no_answer_of_the_task_is_none(task: str, response: str) -> None:
    assert extract_answer(task, build_prompt(make_record(task)["instruction"]) + response) is None


def test_text_without_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a text with '### Response:'.*found 'true'"):
        extract_answer("boolq", "true")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("yahma/llama-7b-hf", "LLaMA-7B"),
        ("/models/llama-13b", "LLaMA-13B"),
        ("meta-llama/Llama-2-7b-hf", "LLaMA2-7B"),
        ("meta-llama/Meta-Llama-3-8B", "LLaMA3-8B"),
        ("meta-llama/Llama-3.1-8B", None),
        ("meta-llama/Llama-2-7b-chat-hf", None),
        ("meta-llama/Llama-2-13b-hf", None),
        ("data/smollm2", None),
    ],
)
def test_models_of_the_paper_are_found_by_name(name: str, model: str | None) -> None:
    assert commonsense.find_paper_model(name) == model
    assert bool(commonsense.paper_columns(name, 32)) == (model is not None)


def test_paper_models_are_those_of_the_configurations() -> None:
    found = set()
    for path in (SCRIPTS.parent / "configs").glob("llama*.yaml"):
        header = path.read_text(encoding="utf-8")
        name = header.partition("model_name_or_path: ")[2].partition("\n")[0]
        rank = int(header.partition("\nr: ")[2].partition("\n")[0])
        columns = commonsense.paper_columns(name, rank)
        assert f"average {columns[f'DoRA r={rank}']['mean']} %" in header, path
        found.add(commonsense.find_paper_model(name))
    assert found == set(commonsense.PAPER_AVERAGES)


def test_a_rank_that_the_paper_lacks_stands_beside_its_rank_32() -> None:
    assert commonsense.paper_columns("llama-7b", 4) == {"LoRA r=4": {"mean": 39.5}, "DoRA r=4": {"mean": 61.9}}
    assert list(commonsense.paper_columns("llama-13b", 4)) == ["LoRA r=32", "DoRA r=32"]
    assert list(commonsense.paper_columns("llama-13b", None)) == ["LoRA r=32", "DoRA r=32"]


def test_the_papers_accuracies_have_its_averages() -> None:
    for model, found in commonsense.PAPER_ACCURACIES.items():
        for case, accuracies in found.items():
            assert len(accuracies) == len(TASKS)
            assert sum(accuracies) / 8 == pytest.approx(commonsense.PAPER_AVERAGES[model][case], abs=0.0501), case


def test_prepare_writes_and_counts_every_record(download: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_list(download / "dataset" / "boolq" / "test.json", [make_record("boolq", number) for number in (1, 10)])
    prepare_commonsense.main([str(download)])
    folder = Path("data/commonsense")
    train = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert train == json.loads((download / "ft-training_set" / "commonsense_170k.json").read_text(encoding="utf-8"))
    for task in TASKS:
        written = json.loads((folder / "test" / f"{task}.json").read_text(encoding="utf-8"))
        assert written == json.loads((download / "dataset" / task / "test.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert "6 boolq\n" in printed
    assert "24 social_i_qa, ARC-Easy, ARC-Challenge, openbookqa\n" in printed
    assert "boolq.json (2 records, 1 of them also in the training data)\n" in printed
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_prepare_limits_each_task_and_repeats(download: Path) -> None:
    chosen = []
    for folder in ("one", "two"):
        prepare_commonsense.main([str(download), "--max_per_task", "2", "--output_dir", folder])
        chosen.append(json.loads((Path(folder) / "train.json").read_text(encoding="utf-8")))
    assert chosen[0] == chosen[1]
    kinds = [prepare_commonsense.kind_of(record) for record in chosen[0]]
    assert {kinds.count(kind) for kind in kinds} == {2}
    assert len(set(kinds)) == 5  # four tasks share their answers
    assert {len(json.loads(path.read_text(encoding="utf-8"))) for path in Path("one/test").iterdir()} == {2}
    prepare_commonsense.main([str(download), "--max_per_task", "2", "--output_dir", "three", "--seed", "1"])
    assert json.loads(Path("three/train.json").read_text(encoding="utf-8")) != chosen[0]


def test_prepare_takes_the_training_file_alone(download: Path) -> None:
    prepare_commonsense.main([str(download / "ft-training_set" / "commonsense_170k.json")])
    assert [path.name for path in Path("data/commonsense").iterdir()] == ["train.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, "expected the keys instruction, input, output, answer with texts, found"),
        ({"instruction": " "}, "expected an instruction, found an empty one"),
        ({"input": "a passage"}, "expected an empty input, .* found 'a passage'"),
        ({"answer": "solution1"}, "expected one of the answers false, true, found 'solution1'"),
        ({"answer": "True"}, "expected one of the answers false, true, found 'True'"),
        ({"output": "the correct answer is false"}, "is read as 'false', but the answer is 'true'"),
        ({"output": "yes"}, "the output 'yes' is read as None, but the answer is 'true'"),
    ],
)
def test_prepare_refuses_a_wrong_record_before_it_writes(
    download: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    path = download / "dataset" / "boolq" / "test.json"
    write_list(path, [make_record("boolq"), make_record("boolq") | changes])
    with refused(rf"{re.escape(str(path))}, record 2: .*{message}"):
        prepare_commonsense.main([str(download)])
    assert not Path("data").exists()
    prepare_commonsense.main([str(download), "--drop_wrong"])
    assert json.loads(Path("data/commonsense/test/boolq.json").read_text(encoding="utf-8")) == [make_record("boolq")]
    assert f"{path}, record 2: dropped: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a list of records in JSON, but it cannot be read"),
        ("{}", "expected a list of records in JSON, found dict"),
        ("[]", "expected at least one record, found none"),
        ("[3]", r"record 1: expected the keys .* found int"),
    ],
)
def test_prepare_refuses_a_wrong_file(tmp_path: Path, content: str, message: str, refused: Refused) -> None:
    path = tmp_path / "commonsense_170k.json"
    path.write_text(content, encoding="utf-8")
    with refused(rf"{re.escape(str(path))}.*{message}"):
        prepare_commonsense.main([str(path)])


def test_prepare_says_which_file_it_misses(download: Path, tmp_path: Path, refused: Refused) -> None:
    (download / "dataset" / "piqa" / "test.json").unlink()
    with refused(r"LLM-Adapters: expected one piqa/test\.json .* found none.*--tasks"):
        prepare_commonsense.main([str(download)])
    prepare_commonsense.main([str(download), "--tasks", "boolq", "ARC-Easy"])
    assert {path.name for path in Path("data/commonsense/test").iterdir()} == {"boolq.json", "ARC-Easy.json"}
    write_list(download / "old" / "commonsense_170k.json", [make_record("piqa")])
    with refused(r"expected one commonsense_170k\.json .* found 2: "):
        prepare_commonsense.main([str(download), "--tasks", "boolq"])
    with refused(r"nowhere: no such file or folder; give a checkout of LLM-Adapters"):
        prepare_commonsense.main([str(tmp_path / "nowhere")])


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
