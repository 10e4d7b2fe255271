"""The eight commonsense tasks of the DoRA paper: answers, prompt, how an answer is read, and the paper's averages.

Imported by `prepare_commonsense.py` and `evaluate_commonsense.py`; not a program of its own.

Data are in the format of the LLM-Adapters project: JSON lists of records `instruction`, `input` (empty), `output`
("the correct answer is ending2") and `answer` ("ending2").
"""

import re
from pathlib import Path
from typing import Any

from llama_data import format_instruction

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
        One of the task's answers, or None where there is none, which counts as wrong.

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


def paper_columns(name_or_path: str, rank: int | None) -> dict[str, float]:
    """The paper's averages to set beside ours, by titles such as "DoRA r=32".

    Args:
        name_or_path: of the base model.
        rank: of the adapter; the paper's largest common one, 32, stands in for a rank that the paper does not have.

    Returns:
        Empty for a model that the paper does not have.
    """
    averages = PAPER_AVERAGES.get(find_paper_model(name_or_path) or "", {})
    if rank not in {known for _, known in averages}:
        rank = 32
    return {f"{method} r={known}": average for (method, known), average in averages.items() if known == rank}
