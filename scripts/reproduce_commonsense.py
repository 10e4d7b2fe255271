"""Accuracy at the paper's size: LLaMA-7B on the eight commonsense tasks, by the scripts that a user would run.

Called by `scripts/reproduce.py accuracy --size full` and `detach --size full`. Each run trains with
`finetune_llama.py configs/llama_7b_rRANK.yaml` and evaluates with `evaluate_commonsense.py`, in processes of their own;
both go on where they were interrupted. Needs a GPU of 40 GB, LLaMA-7B from the Hub, and the data of
`prepare_commonsense.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproduce_common import Options, Plan, Runs, draw_ranks, gain_of, interval

SCRIPTS = Path(__file__).parent
CONFIGS = SCRIPTS.parent / "configs"
FLAGS = {"lora": ["--method", "lora"], "dora": [], "dora_not_detached": ["--detach_norm", "false"]}


def config_of(rank: int) -> list[str]:
    """The paper's configuration for a rank, or that of rank 32 with another rank."""
    path = CONFIGS / f"llama_7b_r{rank}.yaml"
    if path.is_file():
        return [str(path)]
    return [str(CONFIGS / "llama_7b_r32.yaml"), "--r", str(rank), "--lora_alpha", str(2 * rank)]


def train_and_evaluate(options: Options, method: str, rank: int, seed: int) -> dict[str, Any]:
    """Fine-tune and answer all test questions.

    Returns:
        `accuracy`, the unweighted mean over the tasks, and `tasks` with each one's.

    Raises:
        ValueError: the data are missing.
        RuntimeError: a script ended with an error.
    """
    data, output = options.data / "commonsense", Path("outputs/reproduce") / f"commonsense_{method}_r{rank}_seed{seed}"
    train = data / "train.json"
    if not train.is_file():
        raise ValueError(f"{train}: no such file. Run `python scripts/prepare_commonsense.py` on the downloaded data.")
    config, result = config_of(rank), output / "commonsense.json"
    arguments = ["--dataset", str(train), "--seed", str(seed), "--output_dir", str(output), *FLAGS[method]]
    if not (output / "adapter_model.safetensors").is_file():
        execute("finetune_llama.py", [*config, *arguments, "--resume_from_checkpoint", "true"])
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
    total, cases = len(methods) * len(plan.ranks) * len(plan.seeds), {}
    for method in methods:
        for rank in plan.ranks:
            accuracies = [
                runs.do(
                    f"commonsense {method} r={rank} seed={seed}",
                    lambda case=(method, rank, seed): train_and_evaluate(options, *case),  # type: ignore[misc]
                    total,
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
    runs = Runs("accuracy", options, {"model": "LLaMA-7B"})
    cases = train_all(runs, options, plan, ("lora", "dora"))
    runs.finish({"base": {}, "cases": cases, "gains": {"commonsense": gain_of(cases, "commonsense")}})
    draw_ranks(runs, "LLaMA-7B, mean of the eight commonsense tasks")


def run_detach(options: Options, plan: Plan) -> None:
    """DoRA with and without detaching; the memory is that of `reproduce.py memory --size full`."""
    runs = Runs("detach", options, {"model": "LLaMA-7B"})
    runs.adopt("accuracy")
    cases = train_all(runs, options, plan, ("dora", "dora_not_detached"))
    pairs = [
        one - other
        for rank in plan.ranks
        for one, other in zip(
            *(cases[f"commonsense {m} r={rank}"]["accuracies"] for m in ("dora", "dora_not_detached")), strict=True
        )
    ]
    memory = options.results / "memory_full.json"
    if not memory.is_file():
        raise ValueError(f"{memory}: no such file. Run `python scripts/reproduce.py memory --size full` first.")
    found = json.loads(memory.read_text(encoding="utf-8"))["summary"]["llama"]
    totals = found["total_mib"][found["setting"]]
    names = ("reference", "reference_not_detached", "dora", "dora_not_detached")
    summary = {"cases": cases, "differences": {"commonsense": interval(pairs)}}
    runs.finish(summary | {"total_mib": {name: totals[name] for name in names}})
