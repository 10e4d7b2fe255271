"""Records of the commonsense tasks, for the tests of the scripts about them."""

import json
from pathlib import Path
from typing import Any

from prepare.commonsense import TASKS


def make_record(task: str, number: int = 0) -> dict[str, str]:
    answer = TASKS[task][number % 2]
    question = f"Choose: {'x' * (number % 5)} {task} {number}?\n\nAnswer format: {'/'.join(TASKS[task])}"
    return {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def write_list(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
