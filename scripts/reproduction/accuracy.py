"""Accuracy on real data: LoRA, DoRA and full fine-tuning of SmolLM2-135M, by rank, each at its best learning rate.

Called by `scripts/reproduce.py accuracy` and `detach`. For each task, method and rank, a grid of learning rates is
tried with the first seed, and the two with the lowest loss on validation records with every seed; of these the one with
the lower mean is chosen, so that no single run decides. The accuracy on test records, which nothing was chosen by, is
reported. All grids have the same number of rates; lora_alpha is twice the rank, as in the paper.

An answer counts if the model prefers each of its tokens, the end of sequence included, given the prompt and the
tokens before: greedy generation would write just that. One forward pass finds it for a whole batch.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.bases import share_weights
from common.files import digest
from finetune.arguments import DataArguments, ModelArguments, training_values
from finetune.data import AnswerCollator, load_records, tokenize_records
from finetune.encoding import IGNORE
from finetune.model import adapter_config, load_base_model, load_tokenizer
from finetune.trainer import AnswerTrainer
from reproduction import commonsense as reproduce_commonsense
from reproduction import memory as reproduce_memory
from reproduction.common import Options, Plan, Runs, at_edge, difference, draw_detach, draw_ranks, lowest

# Files of prompt/completion records, and the command that writes them.
TASKS = {
    "spelling": ("cmudict", "python scripts/prepare_cmudict.py"),
    "cities": ("cities", "python scripts/prepare_cities.py"),
}
# Of the adapters, around what was best for rank 8; a tenth of it in full fine-tuning. In the order in which a smaller
# grid takes them.
RATES = {"spelling": (4e-3, 2e-3, 8e-3, 1e-3, 1.6e-2), "cities": (2e-3, 4e-3, 1e-3, 5e-4, 8e-3)}
# rates that are tried with every seed
FINALISTS = 2
# tokens of a record, for the memory beside the cost of detaching
MEMORY_LENGTH = 28
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "dora_not_detached": {"method": "dora", "detach_norm": False},
    "full": {"method": "full"},
}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    method: str
    # 0 in full fine-tuning
    rank: int
    rate: float
    seed: int

    @property
    def key(self) -> str:
        rank = f" r={self.rank}" if self.rank else ""
        return f"{self.task} {self.method}{rank} lr={self.rate:g} seed={self.seed}"


# for what does not depend on the run
ANY = Trial("any", "full", 0, 1e-4, 0)


class Laboratory:
    """The base model and the tokenized tasks, loaded once for all runs."""

    def __init__(self, options: Options, plan: Plan) -> None:
        self.options, self.plan = options, plan
        if unknown := [task for task in plan.tasks if task not in TASKS]:
            raise ValueError(f"expected tasks of {', '.join(TASKS)}, found {unknown[0]!r}.")
        if plan.num_rates > (most := min(map(len, RATES.values()))):
            raise ValueError(
                f"expected at most {most} rates, for there are no more in the grid, found {plan.num_rates}."
            )
        # A CPU without bf16 instructions multiplies in bf16 at a hundredth of its fp32 speed (2 for 130 GFLOP/s).
        self.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
        self.folder = options.data / "smollm2"
        files = sorted(self.folder.glob("*.gguf"))
        if not files and not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.folder}: no model there. Run `python scripts/prepare_smollm2.py` first.")
        self.gguf_file = files[0].name if files else None
        self.tasks: dict[str, tuple[Dataset, Dataset, Dataset]] = {}
        self.digests: dict[str, str] = {}
        # of `datasets`; the runs have their own lines
        disable_progress_bars()
        disable_progress_bar()

    def model(self, trial: Trial) -> ModelArguments:
        return ModelArguments(
            model_name_or_path=str(self.folder),
            gguf_file=self.gguf_file,
            dtype="float32" if trial.method == "full" else str(self.dtype).removeprefix("torch."),
            **METHODS[trial.method],
            r=max(trial.rank, 1),
            lora_alpha=2.0 * max(trial.rank, 1),
        )

    def training(self, trial: Trial, output_dir: str) -> TrainingArguments:
        plan = self.plan
        values = {
            "output_dir": output_dir,
            "bf16": self.dtype is torch.bfloat16,
            "learning_rate": trial.rate,
            "per_device_train_batch_size": plan.batch,
            "per_device_eval_batch_size": 100,
            "max_steps": plan.steps,
            "warmup_steps": max(1, plan.steps // 10),
            "seed": trial.seed,
            "logging_steps": plan.steps,
            "disable_tqdm": not sys.stderr.isatty(),
        }
        return TrainingArguments(**training_values(values))

    def settings(self) -> dict[str, Any]:
        """What the result of a run depends on beside its `Trial`."""
        return self.plan.settings() | {"device": self.options.device.type, "dtype": str(self.dtype)}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model(ANY))

    @cached_property
    def base(self) -> Any:
        model = load_base_model(self.model(ANY), self.tokenizer).to(self.dtype)
        model.config.use_cache = False
        return model.to(self.options.device).requires_grad_(False)

    def inputs(self, task: str) -> str:
        """Hexadecimal digits that differ if the files of the model or of the task do."""
        if task not in self.digests:
            train, test = self.files(task)
            self.digests[task] = digest(*sorted(p for p in self.folder.iterdir() if p.is_file()), train, test)
        return self.digests[task]

    def files(self, task: str) -> tuple[Path, Path]:
        """The records to train on and to choose by, and those to report."""
        folder, command = TASKS[task]
        train, test = (self.options.data / folder / f"{name}.jsonl" for name in ("train", "test"))
        if not (train.is_file() and test.is_file()):
            raise ValueError(f"{train.parent}: no train.jsonl and test.jsonl there. Run `{command}` first.")
        return train, test

    def data(self, task: str) -> tuple[Dataset, Dataset, Dataset]:
        """Records to train on, to choose the learning rate with, and to report."""
        if task not in self.tasks:
            plan, (train, test) = self.plan, self.files(task)
            records = load_records(str(train), None, "train")
            counts = (plan.num_validation, plan.num_train)
            if len(records) < sum(counts):
                raise ValueError(f"{train}: expected at least {sum(counts)} records, found {len(records)}.")
            parts = [
                records.select(range(plan.num_validation, sum(counts))),
                records.select(range(plan.num_validation)),
                load_records(str(test), None, "train"),
            ]
            parts[2] = parts[2].select(range(min(plan.num_test, len(parts[2]))))
            data = DataArguments(dataset=task, max_length=64)
            encoded = [tokenize_records(part, str(train), self.tokenizer, data) for part in parts]
            self.tasks[task] = (encoded[0], encoded[1], encoded[2])
        return self.tasks[task]

    def build(self, trial: Trial) -> nn.Module:
        """A model to train: the shared base with an adapter, or a copy of it."""
        set_seed(trial.seed)
        if trial.method == "full":
            return copy.deepcopy(self.base).float().requires_grad_(True)
        return get_peft_model(share_weights(self.base), adapter_config(self.model(trial)))

    def train(self, trial: Trial, callbacks: Sequence[TrainerCallback] = ()) -> nn.Module:
        """The model after `plan.steps` optimizer steps."""
        train, _, _ = self.data(trial.task)
        with tempfile.TemporaryDirectory() as folder:
            trainer = AnswerTrainer(
                model=self.build(trial),
                args=self.training(trial, folder),
                data_collator=AnswerCollator(self.tokenizer.pad_token_id),
                train_dataset=train,
                callbacks=list(callbacks),
            )
            # a run has one line, when it ends
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model.eval()

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train and measure: validation loss, test loss, and the share of test answers that are right in full."""
        model = self.train(trial)
        _, validation, test = self.data(trial.task)
        loss, _ = self.measure(model, validation)
        test_loss, accuracy = self.measure(model, test)
        return dataclasses.asdict(trial) | {"validation_loss": loss, "test_loss": test_loss, "accuracy": accuracy}

    @torch.no_grad()
    def measure(self, model: nn.Module, records: Dataset, batch_size: int = 100) -> tuple[float, float]:
        """Mean loss per answer token, and the share of records whose answer tokens are all the most likely ones."""
        collate, total, tokens, right = AnswerCollator(self.tokenizer.pad_token_id), 0.0, 0, 0
        # little padding
        order = sorted(range(len(records)), key=lambda i: len(records[i]["input_ids"]))
        for start in range(0, len(order), batch_size):
            batch = collate([records[i] for i in order[start : start + batch_size]])
            batch = {name: tensor.to(self.options.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            # the prompts need no logits, which take longer to write than the model takes to compute
            asked = torch.arange(int((labels != IGNORE).any(0).nonzero()[0]), labels.shape[1], device=labels.device)
            with torch.autocast(self.options.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
                logits = model(**batch, logits_to_keep=asked).logits
            labels = labels[:, asked]
            answers = labels != IGNORE
            total += nn.functional.cross_entropy(logits[answers].float(), labels[answers], reduction="sum").item()
            tokens += int(answers.sum())
            right += int(((logits.argmax(-1) == labels) | ~answers).all(1).sum())
        return total / tokens, right / len(records)


def train_all(runs: Runs, laboratory: Laboratory, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every run of the plan that the file does not have yet.

    Returns:
        For each task, method and rank the chosen rate and the accuracies over the seeds.
    """
    plan, summary = laboratory.plan, {}
    seeds, finalists = len(plan.seeds), min(FINALISTS, plan.num_rates)
    cases = [(method, rank) for method in methods for rank in ((0,) if method == "full" else plan.ranks)]
    total = len(plan.tasks) * (1 + len(cases) * (plan.num_rates + finalists * (seeds - 1)))

    def do(trial: Trial) -> dict[str, Any]:
        return runs.do(trial.key, lambda: laboratory.run(trial), total, laboratory.inputs(trial.task))

    for task in plan.tasks:
        runs.do(f"{task} base", lambda task=task: measure_base(laboratory, task), total, laboratory.inputs(task))  # type: ignore[misc]
        for method, rank in cases:
            rates = [round(rate / 10, 9) if method == "full" else rate for rate in RATES[task][: plan.num_rates]]

            def loss(rate: float, seed: int, task: str = task, method: str = method, rank: int = rank) -> float:
                return do(Trial(task, method, rank, rate, seed))["validation_loss"]

            first = {rate: loss(rate, plan.seeds[0]) for rate in rates}
            means = {r: statistics.mean(loss(r, s) for s in plan.seeds) for r in lowest(first)[:FINALISTS]}
            best = lowest(means)[0]
            found = [do(Trial(task, method, rank, best, seed)) for seed in plan.seeds]
            accuracies = [result["accuracy"] for result in found]
            summary[f"{task} {method}" + (f" r={rank}" if rank else "")] = {
                "task": task,
                "method": method,
                "rank": rank,
                "rate": best,
                "edge": at_edge(best, rates),
                # of the first seed
                "validation_loss_by_rate": {f"{rate:g}": value for rate, value in first.items()},
                # over all seeds
                "mean_validation_loss": {f"{rate:g}": value for rate, value in means.items()},
                "accuracies": accuracies,
                "mean": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if seeds > 1 else 0.0,
                "test_loss": statistics.mean(result["test_loss"] for result in found),
            }
    return summary


def measure_base(laboratory: Laboratory, task: str) -> dict[str, Any]:
    loss, accuracy = laboratory.measure(laboratory.base, laboratory.data(task)[2])
    return {"task": task, "method": "base", "test_loss": loss, "accuracy": accuracy}


def plan_of(options: Options) -> Plan:
    """What is trained unless the command line says otherwise."""
    if options.dry_run:
        sizes = {"steps": 2, "batch": 2, "num_train": 8, "num_validation": 4, "num_test": 4}
        return Plan(tasks=("spelling",), ranks=(1, 2), seeds=(0, 1), **sizes)
    # LLaMA-7B; the paper's figure by rank is --ranks 4 8 16 32 64
    if options.size == "full":
        return Plan(tasks=("commonsense",), ranks=(4, 32))
    return Plan()


def run(options: Options, plan: Plan) -> None:
    """Train, measure and draw; see the module's docstring."""
    if options.size == "full" and not options.dry_run:
        reproduce_commonsense.run(options, plan)
        return
    laboratory = Laboratory(options, plan)
    runs = Runs("accuracy", options, laboratory.settings())
    summary = train_all(runs, laboratory, ("lora", "dora", "full"))
    bases = {task: runs.runs[f"{task} base"]["accuracy"] for task in plan.tasks}
    gains = {task: difference(summary, task) for task in plan.tasks}
    runs.finish({"base": bases, "cases": summary, "gains": gains})
    draw_ranks(runs, f"SmolLM2-135M, {plan.steps} steps of {plan.batch} records")
    for case, found in summary.items():
        rate = f"lr {found['rate']:g}{', at the edge of its grid,' if found['edge'] else ''}"
        print(f"{case:<24} {rate} accuracy {found['mean']:6.1%} +- {found['spread']:.1%}")
    for task, gain in gains.items():
        print(
            f"{task}: DoRA - LoRA {gain['mean']:+.2%} [{gain['low']:+.2%}, {gain['high']:+.2%}], {gain['count']} seeds"
        )


def run_detach(options: Options, plan: Plan) -> None:
    """Accuracy and memory with and without detaching, at the middle rank; Table 7 of the paper."""
    if options.size == "full" and not options.dry_run:
        reproduce_commonsense.run_detach(options, plan)
        return
    plan = dataclasses.replace(plan, ranks=(plan.middle,))
    laboratory = Laboratory(options, plan)
    runs = Runs("detach", options, laboratory.settings())
    runs.adopt("accuracy")
    cases = train_all(runs, laboratory, ("dora", "dora_not_detached"))

    def batch(model: Any, size: int, length: int, device: torch.device) -> dict[str, Any]:
        ids = torch.randint(model.config.vocab_size, (size, length), device=device)
        return {"input_ids": ids, "labels": ids}

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    family = reproduce_memory.Family(
        lambda _: laboratory.base, batch, targets, plan.middle, 2.0 * plan.middle, 0.0, [(plan.batch, MEMORY_LENGTH)]
    )
    memory = {
        method: runs.do(
            f"memory {method} r={plan.middle} {plan.batch} x {MEMORY_LENGTH}",
            lambda m=method: reproduce_memory.measure(m, laboratory.base, family, *family.settings[0], options.device),  # type: ignore[misc]
        )
        for method in ("reference", "reference_not_detached", "dora", "dora_not_detached")
    }
    differences = {task: difference(cases, task, ("dora", "dora_not_detached")) for task in plan.tasks}
    totals = {m: r["total_mib"] for m, r in memory.items()}
    memory_of = f"batch {plan.batch} x length {MEMORY_LENGTH}, r={plan.middle}, no dropout"
    runs.finish({"cases": cases, "differences": differences, "total_mib": totals, "memory_of": memory_of})
    draw_detach(runs, "SmolLM2-135M")
    for case, found in cases.items():
        print(f"{case:<36} accuracy {found['mean']:6.1%} +- {found['spread']:.1%}")
    for method, found in memory.items():
        print(f"{method:<36} {found['total_mib']:,.1f} MiB")
