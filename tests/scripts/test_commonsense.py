"""The commonsense pipeline on small local files: answers, preparation, evaluation, and all with a fine-tune run."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commonsense_fixtures import make_record, write_list
from finetune_fixtures import make_tokenizer

import prepare_commonsense
from finetune.encoding import IGNORE, encode_record
from prepare import commonsense
from prepare.commonsense import MARKER, TASKS, build_prompt, extract_answer


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default output folders of the scripts lie in a temporary folder."""
    monkeypatch.chdir(tmp_path)


Refused = Callable[[str], contextlib.AbstractContextManager[None]]
SCRIPTS = Path(__file__).parents[2] / "scripts"
EVERY_ANSWER = [(task, answer) for task, answers in TASKS.items() for answer in answers]


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
        # learnt in small letters, and read so by the paper's evaluation
        ("boolq", "True"),
        ("piqa", "the correct answer is option1"),
        ("piqa", "solution3"),
        ("winogrande", "solution1"),
        ("hellaswag", "answer1 ending5 ending 1"),
        ("openbookqa", "answer6"),
        ("ARC-Easy", "the correct answer is ending2"),
        # of another question, which the model made up
        ("social_i_qa", f"I do not know.\n\n{MARKER}\nanswer1"),
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
    # four tasks share their answers
    assert len(set(kinds)) == 5
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
