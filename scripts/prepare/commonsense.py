"""The eight commonsense tasks of the DoRA paper: answers, prompt, how an answer is read, and the paper's figures.

Data are in the format of the LLM-Adapters project: JSON lists of records `instruction`, `input` (empty), `output`
("the correct answer is ending2") and `answer` ("ending2").
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from finetune.encoding import format_instruction

# The answers of each task, in the order of the paper's tables.
TASKS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
KEYS = ("instruction", "input", "output", "answer")
MARKER = "### Response:"

# Averages over the eight tasks in percent, by (method, rank): arXiv 2402.09353, the results on commonsense reasoning,
# and for LLaMA-7B its robustness towards the rank.
PAPER_AVERAGES: dict[str, dict[tuple[str, int], float]] = {
    "LLaMA-7B": {
        ("LoRA", 4): 39.5,
        ("DoRA", 4): 61.9,
        ("LoRA", 8): 40.7,
        ("DoRA", 8): 77.9,
        ("LoRA", 16): 70.9,
        ("DoRA", 16): 77.5,
        ("LoRA", 32): 74.7,
        ("DoRA", 32): 78.4,
        ("LoRA", 64): 65.8,
        ("DoRA", 64): 72.1,
    },
    "LLaMA-13B": {("LoRA", 32): 80.5, ("DoRA", 16): 80.8, ("DoRA", 32): 81.5},
    "LLaMA2-7B": {("LoRA", 32): 77.6, ("DoRA", 16): 80.5, ("DoRA", 32): 79.7},
    "LLaMA3-8B": {("LoRA", 32): 80.8, ("DoRA", 16): 85.0, ("DoRA", 32): 85.2},
}
# The accuracies behind those averages, in percent and in the order of TASKS, if the paper gives them.
PAPER_ACCURACIES: dict[str, dict[tuple[str, int], tuple[float, ...]]] = {
    "LLaMA-7B": {
        ("LoRA", 32): (68.9, 80.7, 77.4, 78.1, 78.8, 77.8, 61.3, 74.8),
        ("DoRA", 16): (70.0, 82.6, 79.7, 83.2, 80.6, 80.6, 65.4, 77.6),
        ("DoRA", 32): (69.7, 83.4, 78.6, 87.2, 81.0, 81.9, 66.2, 79.2),
    },
    "LLaMA-13B": {
        ("LoRA", 32): (72.1, 83.5, 80.5, 90.5, 83.7, 82.8, 68.3, 82.4),
        ("DoRA", 16): (72.5, 85.3, 79.9, 90.1, 82.9, 82.7, 69.7, 83.6),
        ("DoRA", 32): (72.4, 84.9, 81.5, 92.4, 84.2, 84.2, 69.6, 82.8),
    },
    "LLaMA2-7B": {
        ("LoRA", 32): (69.8, 79.9, 79.5, 83.6, 82.6, 79.8, 64.7, 81.0),
        ("DoRA", 16): (72.0, 83.1, 79.9, 89.1, 83.0, 84.5, 71.0, 81.2),
        ("DoRA", 32): (71.8, 83.7, 76.0, 89.1, 82.6, 83.7, 68.2, 82.4),
    },
    "LLaMA3-8B": {
        ("LoRA", 32): (70.8, 85.2, 79.9, 91.7, 84.3, 84.2, 71.2, 79.0),
        ("DoRA", 16): (74.5, 88.8, 80.3, 95.5, 84.7, 90.1, 79.1, 87.2),
        ("DoRA", 32): (74.6, 89.3, 79.9, 95.5, 85.6, 90.5, 80.4, 85.8),
    },
}
# The whole of a model's name, without its owner: neither Llama-3.1-8B nor Llama-2-7b-chat-hf is one of the paper's.
PAPER_MODELS = {
    "LLaMA-7B": r"llama-7b(-hf)?",
    "LLaMA-13B": r"llama-13b(-hf)?",
    "LLaMA2-7B": r"(meta-)?llama-?2-7b(-hf)?",
    "LLaMA3-8B": r"(meta-)?llama-?3-8b(-hf)?",
}


def build_prompt(instruction: str) -> str:
    """The prompt of a question: the very text that `finetune_llama.py` puts before the answers that it trains on."""
    return format_instruction(instruction, None)


def extract_answer(task: str, text: str) -> str | None:
    """The answer that a model gave: the first of the task's answers in its response, in small letters as in training.

    The response ends where a model that does not stop opens another one. As in the paper's evaluation the answer may
    stand anywhere: "untrue" is read as "true".

    Args:
        task: one of `TASKS`.
        text: the prompt and what the model wrote after it.

    Returns:
        One of the task's answers, or None if there is none, which counts as wrong.

    Raises:
        ValueError: `text` has no "### Response:".
    """
    _, marker, response = text.partition(MARKER)
    if not marker:
        raise ValueError(f"expected a text with {MARKER!r}, as build_prompt writes it, found {text[:80]!r}.")
    found = re.search("|".join(TASKS[task]), response.partition(MARKER)[0])
    return found and found.group()


def tasks_of_answer(answer: str) -> list[str]:
    """The tasks that have this answer: one, or for answer1 to answer5 four."""
    return [task for task, answers in TASKS.items() if answer in answers]


def check_record(record: Any, tasks: list[str] | None = None) -> None:
    """Check a record: its keys, and that reading its `output` gives its `answer`, one that its task has.

    Args:
        tasks: what the record may belong to; None for all tasks.

    Raises:
        ValueError: saying what was expected and found.
    """
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in KEYS):
        raise ValueError(f"expected the keys {', '.join(KEYS)} with texts, found {found}")
    if not record["instruction"].strip():
        raise ValueError("expected an instruction, found an empty one")
    if record["input"]:
        raise ValueError(
            f"expected an empty input, as the prompt of the evaluation has none, found {record['input']!r}"
        )
    fitting = [task for task in tasks_of_answer(record["answer"]) if tasks is None or task in tasks]
    if not fitting:
        expected = sorted({answer for task in tasks or TASKS for answer in TASKS[task]})
        raise ValueError(f"expected one of the answers {', '.join(expected)}, found {record['answer']!r}")
    read = extract_answer(fitting[0], MARKER + record["output"])
    if read != record["answer"]:
        raise ValueError(f"the output {record['output']!r} is read as {read!r}, but the answer is {record['answer']!r}")


def find_paper_model(name_or_path: str) -> str | None:
    """The model of the paper that a Hub id or a folder is named after, None for any other."""
    name = Path(name_or_path).name.lower()
    return next((model for model, pattern in PAPER_MODELS.items() if re.fullmatch(pattern, name)), None)


def paper_columns(name_or_path: str, rank: int | None) -> dict[str, dict[str, float]]:
    """The paper's figures to set beside ours, by titles such as "DoRA r=32".

    Args:
        name_or_path: of the base model.
        rank: of the adapter; the paper's largest common one, 32, stands in for a rank that the paper does not have.

    Returns:
        For each title the percentages by task, if the paper gives them, and their "mean". Empty for a model that the
        paper does not have.
    """
    model = find_paper_model(name_or_path) or ""
    averages, accuracies = PAPER_AVERAGES.get(model, {}), PAPER_ACCURACIES.get(model, {})
    if rank not in {known for _, known in averages}:
        rank = 32
    columns: dict[str, dict[str, float]] = {}
    for case, average in averages.items():
        if case[1] == rank:
            by_task = dict(zip(TASKS, accuracies[case], strict=True)) if case in accuracies else {}
            columns[f"{case[0]} r={rank}"] = by_task | {"mean": average}
    return columns


Record = dict[str, str]


def read_records(path: Path, tasks: list[str] | None, drop_wrong: bool) -> list[Record]:
    """Read a JSON list of records and check each of them.

    Args:
        tasks: what the records may belong to; None for all tasks.
        drop_wrong: whether a wrong record is left out, with a line about it, instead of refused.

    Raises:
        ValueError: the file is no such list, or a record is wrong; names the file and the number of the record from 1.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a list of records in JSON, but it cannot be read: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a list of records in JSON, found {type(values).__name__}.")
    records = []
    for number, value in enumerate(values, start=1):
        try:
            check_record(value, tasks)
        except ValueError as error:
            if not drop_wrong:
                raise ValueError(f"{path}, record {number}: {error}. Mend it, or give --drop_wrong.") from error
            print(f"{path}, record {number}: dropped: {error}", file=sys.stderr)
        else:
            records.append({key: value[key] for key in KEYS})
    if not records:
        raise ValueError(f"{path}: expected at least one record, found none.")
    return records
