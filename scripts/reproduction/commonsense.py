"""Accuracy at the paper's size: LLaMA-7B on the eight commonsense tasks, by the scripts that a user would run.

Called by `scripts/reproduce.py accuracy --size full` and `detach --size full`. Each run trains with
`finetune_llama.py configs/llama_7b_rRANK.yaml` and evaluates with `evaluate_commonsense.py`, in processes of their own;
both go on where they were interrupted. All methods train with the paper's learning rate for the rank, from the file,
not with one of their own; no data are set aside to choose it by. Needs a GPU of 80 GB, LLaMA-7B from the Hub, and the
data of `prepare_commonsense.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import digest
from reproduction.common import Options, Plan, Runs, difference, draw_detach, draw_ranks

SCRIPTS = Path(__file__).parents[1]
CONFIGS = SCRIPTS.parent / "configs"
FLAGS = {"lora": ["--method", "lora"], "dora": [], "dora_not_detached": ["--detach_norm", "false"]}


def config_of(rank: int) -> list[str]:
    """The paper's configuration for a rank, or that of rank 32 with another rank."""
    path = CONFIGS / f"llama_7b_r{rank}.yaml"
    if path.is_file():
        return [str(path)]
    return [str(CONFIGS / "llama_7b_r32.yaml"), "--r", str(rank), "--lora_alpha", str(2 * rank)]


def settings_of(options: Options, plan: Plan) -> dict[str, Any]:
    """What every run depends on: the configurations' and the data's content.

    Raises:
        ValueError: the data are missing.
    """
    train = options.data / "commonsense" / "train.json"
    if not train.is_file():
        raise ValueError(f"{train}: no such file. Run `python scripts/prepare_commonsense.py` on the downloaded data.")
    files = {str(train): train, **{f"r={rank}": Path(config_of(rank)[0]) for rank in plan.ranks}}
    digests = {name: digest(path) for name, path in files.items()}
    return {"model": "LLaMA-7B", "train": digests.pop(str(train)), "configs": digests}


def train_and_evaluate(options: Options, settings: dict[str, Any], method: str, rank: int, seed: int) -> dict[str, Any]:
    """Fine-tune and answer all test questions.

    Returns:
        `accuracy`, the unweighted mean over the tasks, and `tasks` with each one's.

    Raises:
        RuntimeError: a script ended with an error.
    """
    data, config = options.data / "commonsense", config_of(rank)
    mark = hashlib.sha256(f"{settings['train']} {settings['configs'][f'r={rank}']}".encode()).hexdigest()[:8]
    output = Path("outputs/reproduce") / f"commonsense_{method}_r{rank}_seed{seed}_{mark}"
    if options.force:
        shutil.rmtree(output, ignore_errors=True)
    arguments = ["--dataset", str(data / "train.json"), "--seed", str(seed), "--output_dir", str(output)]
    if not (output / "adapter_model.safetensors").is_file():
        execute("finetune_llama.py", [*config, *arguments, *FLAGS[method], "--resume_from_checkpoint", "true"])
    result = output / "commonsense.json"
    model = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    evaluation = ["--model_name_or_path", model, "--adapter", str(output), "--data", str(data / "test")]
    execute("evaluate_commonsense.py", [*evaluation, "--json", str(result)])
    found = json.loads(result.read_text(encoding="utf-8"))
    accuracies = {task: entry["accuracy"] for task, entry in found["tasks"].items()}
    return {
        "task": "commonsense", "method": method, "rank": rank, "seed": seed,
        "accuracy": found["summary"]["mean_accuracy"], "tasks": accuracies,
    }  # fmt: skip


def execute(script: str, arguments: Sequence[str]) -> None:
    status = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments]).returncode
    if status != 0:
        raise RuntimeError(f"{script} ended with status {status}; its message stands above.")


def train_all(runs: Runs, options: Options, plan: Plan, methods: Sequence[str]) -> dict[str, Any]:
    """For each method and rank the accuracies over the seeds."""
    total, settings, cases = len(methods) * len(plan.ranks) * len(plan.seeds), runs.content["settings"], {}
    # the rest is in the settings
    inputs = digest(*sorted((options.data / "commonsense" / "test").glob("*.json")))
    for method in methods:
        for rank in plan.ranks:
            accuracies = [
                runs.do(
                    f"commonsense {method} r={rank} seed={seed}",
                    lambda case=(settings, method, rank, seed): train_and_evaluate(options, *case),  # type: ignore
                    total,
                    inputs,
                )["accuracy"]
                for seed in plan.seeds
            ]
            cases[f"commonsense {method} r={rank}"] = {
                "task": "commonsense", "method": method, "rank": rank, "accuracies": accuracies,
                "mean": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            }  # fmt: skip
    return cases


def run(options: Options, plan: Plan) -> None:
    """LoRA against DoRA."""
    runs = Runs("accuracy", options, settings_of(options, plan))
    cases = train_all(runs, options, plan, ("lora", "dora"))
    runs.finish({"base": {}, "cases": cases, "gains": {"commonsense": difference(cases, "commonsense")}})
    draw_ranks(runs, "LLaMA-7B, mean of the eight commonsense tasks")


def run_detach(options: Options, plan: Plan) -> None:
    """DoRA with and without detaching; the memory is that of `reproduce.py memory --size full`."""
    memory = options.path("memory")
    content = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
    if "summary" not in content:
        raise ValueError(f"{memory}: not there yet. Run `python scripts/reproduce.py memory --size full` first.")
    found = content["summary"]["llama"]
    names = ("reference", "reference_not_detached", "dora", "dora_not_detached")
    totals = found["total_mib"][found["setting"]]
    if missing := [name for name in names if name not in totals]:
        raise ValueError(
            f"{memory}: expected the memory of {', '.join(names)} at {found['setting']}, found none of {missing[0]}, "
            "which did not fit. Measure it on a GPU with more memory."
        )
    runs = Runs("detach", options, settings_of(options, plan))
    runs.adopt("accuracy")
    cases = train_all(runs, options, plan, ("dora", "dora_not_detached"))
    differences = difference(cases, "commonsense", ("dora", "dora_not_detached"))
    runs.finish(
        {
            "cases": cases,
            "differences": {"commonsense": differences},
            "total_mib": {name: totals[name] for name in names},
            "memory_of": f"batch x length {found['setting']}, with the paper's dropout",
        }
    )
    draw_detach(runs, "LLaMA-7B")
