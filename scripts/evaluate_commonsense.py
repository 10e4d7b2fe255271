"""Measure the accuracy of a model on the eight commonsense tasks of the DoRA paper, with or without an adapter.

    python scripts/evaluate_commonsense.py --model_name_or_path yahma/llama-7b-hf --adapter outputs/llama_7b_r32

On the CPU, with the small model of `scripts/prepare_smollm2.py`:

    python scripts/evaluate_commonsense.py --model_name_or_path data/smollm2 \\
        --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --tasks boolq piqa --limit 20

The test sets are those of `scripts/prepare_commonsense.py`. Expected result: a table with the accuracy per task and
their unweighted mean, beside the paper's averages if the model is one of the paper's, and a JSON file with the
figures and every answer. The file is rewritten after each task: a run that was killed goes on after its last whole
task, and tasks can be measured one by one. Answers are generated greedily, so that the figures repeat; one that is none
of the task's counts as wrong.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from finetune.generation import generate_answers, load_model
from prepare.commonsense import TASKS, Record, build_prompt, extract_answer, paper_columns, read_records

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def evaluate_task(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    records: Sequence[Record],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Let the model answer the questions of a task.

    Returns:
        `accuracy`, the share of right answers; `num_records`; `num_unread`, responses without an answer; `seconds`; and
        `answers`, for each record what was expected and found, and the response.
    """
    prompts = [build_prompt(record["instruction"]) for record in records]
    # Prompts of about one length share a batch, which spares padding; the longest come first, so that too large a batch
    # fails at once.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    start = time.perf_counter()
    in_order = generate_answers(model, tokenizer, [prompts[place] for place in order], batch_size, max_new_tokens)
    seconds = time.perf_counter() - start
    responses = dict(zip(order, in_order, strict=True))
    answers = [
        {
            "expected": record["answer"],
            "found": extract_answer(task, prompts[place] + responses[place]),
            "response": responses[place],
        }
        for place, record in enumerate(records)
    ]
    return {
        "accuracy": sum(answer["expected"] == answer["found"] for answer in answers) / len(answers),
        "num_records": len(answers),
        "num_unread": sum(answer["found"] is None for answer in answers),
        "seconds": round(seconds, 1),
        "answers": answers,
    }


def mark_files(name_or_path: str | None) -> str | None:
    """A mark of the weights in a folder, which changes when they are written again; None for an id of the Hub."""
    if name_or_path is None or not Path(name_or_path).is_dir():
        return None
    files = sorted(path for pattern in WEIGHTS for path in Path(name_or_path).glob(pattern))
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def load_results(path: Path, settings: dict[str, Any], restart: bool) -> dict[str, Any]:
    """The results so far, to add tasks to.

    Raises:
        ValueError: the file at `path` is of other settings, or none of ours.
    """
    empty = {"settings": settings, "tasks": {}}
    if restart or not path.is_file():
        return empty
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        known, tasks = stored["settings"], stored["tasks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results of this script, with settings and tasks, but they cannot be read: {error!r}. "
            "Give another file to --json, or --restart to overwrite it."
        ) from error
    differing = [key for key in settings if known.get(key) != settings[key]]
    if differing:
        listed = "; ".join(f"{key} found {known.get(key)!r}, expected {settings[key]!r}" for key in differing)
        raise ValueError(
            f"{path}: holds results of other settings: {listed}. Give another file to --json, or --restart to forget "
            "what is there."
        )
    return {"settings": settings, "tasks": tasks}


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """The unweighted mean over the measured tasks, and whether it may stand beside the paper's: eight whole tasks."""
    accuracies = [result["accuracy"] for result in results["tasks"].values()]
    return {
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "num_tasks": len(accuracies),
        "is_complete": set(results["tasks"]) == set(TASKS) and results["settings"]["limit"] is None,
    }


def format_table(results: dict[str, Any], name: str) -> str:
    """The accuracies in percent, task by task and their mean, beside the paper's if it gives them."""
    rows = [(task, results["tasks"][task]) for task in TASKS if task in results["tasks"]]
    paper = results["paper"]
    head = ["", name, *(f"paper, {title}" for title in paper)]
    body = [
        [task, f"{result['accuracy']:.1%}", *(f"{of[task]}%" if task in of else "-" for of in paper.values())]
        for task, result in rows
    ]
    mean = results["summary"]["mean_accuracy"]
    body.append([f"mean of {len(rows)}", f"{mean:.1%}", *(f"{of['mean']}%" for of in paper.values())])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = []
    for title, *cells in [head, *body]:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"{title:<{widths[0]}}", *padded]))
    if paper and not results["summary"]["is_complete"]:
        lines.append(f"The paper's averages are over all of {len(TASKS)} tasks: not comparable with this selection.")
    return "\n".join(lines)


def describe_adapter(model: PreTrainedModel | PeftModel) -> dict[str, Any] | None:
    """Method and rank of the adapter on a model, None without one."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter]
    kind = config.peft_type.value
    method = "DoRA" if getattr(config, "use_dora", False) else "LoRA" if kind == "LORA" else kind
    return {"method": method, "r": getattr(config, "r", None)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--gguf_file")
    parser.add_argument("--adapter", help="folder or Hub id; without it the model itself is measured")
    parser.add_argument("--data", type=Path, default=Path("data/commonsense/test"), help="folder of <task>.json files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=positive, help="take the first records of each task only")
    parser.add_argument("--batch_size", type=positive, default=16)
    # "the correct answer is solution2" has 8 tokens with LLaMA's tokenizer; this leaves room for another wording.
    parser.add_argument("--max_new_tokens", type=positive, default=32)
    parser.add_argument(
        "--json", type=Path, help="results (default: outputs/commonsense/NAME.json, NAME the adapter's)"
    )
    parser.add_argument("--restart", action="store_true", help="forget the results that the file has")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Evaluate, task by task, and print the table."""
    name = Path(args.adapter or args.model_name_or_path).name
    path = args.json or Path("outputs/commonsense") / f"{name}.json"
    if missing := [task for task in args.tasks if not (args.data / f"{task}.json").is_file()]:
        raise ValueError(
            f"{args.data}: expected a file <task>.json for each task, missing {', '.join(missing)}. Run "
            "`python scripts/prepare_commonsense.py`, or give --tasks."
        )
    records = {task: read_records(args.data / f"{task}.json", [task], drop_wrong=False) for task in args.tasks}
    settings = {
        "model": args.model_name_or_path,
        "gguf_file": args.gguf_file,
        "model_files": mark_files(args.model_name_or_path),
        "adapter": args.adapter,
        "adapter_files": mark_files(args.adapter),
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
    }
    results = load_results(path, settings, args.restart)
    model, tokenizer = load_model(args.model_name_or_path, args.gguf_file, args.adapter)
    results["adapter"] = describe_adapter(model)
    rank = results["adapter"] and results["adapter"]["r"]
    results["paper"] = paper_columns(args.model_name_or_path, rank)
    for number, task in enumerate(args.tasks, start=1):
        digest = hashlib.sha256((args.data / f"{task}.json").read_bytes()).hexdigest()[:16]
        stored = results["tasks"].get(task, {})
        if stored.get("data") == digest:
            note = "measured before"
        else:
            selection = records[task][: args.limit]
            found = evaluate_task(model, tokenizer, task, selection, args.batch_size, args.max_new_tokens)
            results["tasks"][task] = stored = {"data": digest, **found}
            results["summary"] = summarize(results)
            results["machine"] = describe_machine(model.device)
            write_json(path, results)
            note = f"{stored['seconds']:.0f} s"
        print(
            f"[{number}/{len(args.tasks)}] {task}: accuracy {stored['accuracy']:.1%} ({stored['num_records']} records, "
            f"{stored['num_unread']} without an answer, {note})",
            flush=True,
        )
    results["summary"] = summarize(results)
    write_json(path, results)
    print(format_table(results, name))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
