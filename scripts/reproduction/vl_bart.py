"""VL-BART answers questions about pictures, adapted by LoRA, by DoRA with and without detaching, and in full.

Called by `scripts/reproduce.py vl_bart`; the settings are those of configs/vl_bart_*.yaml. Where no pretrained BART is
at hand, a small one is first trained in full on some kinds of questions and kept in outputs/reproduce; each method then
adapts it to another kind. A grid of learning rates of equal size is tried for each method with the first seed; that
with the lowest loss on training pictures that are held out gets all seeds. Reported is the accuracy on the test part,
beside that of guessing from the question alone and of the adapted model with another question's picture.

easy-vqa's pictures do not go in as pixels alone: their features are made by hand, silhouettes and colours that stand
for those of a trained detector, as scripts/prepare_easy_vqa.py says. So the figures compare the methods, not VL-BART
with other models. A dry run takes easy-vqa and a toy backbone, whatever the configuration names.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from benchmarks.contenders import share_weights
from common.memory import replacing
from dora_peft import DoraConfig, param_groups
from reproduction.common import Options, Runs, at_edge, digest, interval, lowest
from vl_bart.data import IGNORE, Part, Record, load_part, make_batch, question_only, word_tokenizer
from vl_bart.model import VlBartForConditionalGeneration, build_small

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = {
    "lora": "LoRA", "dora": "DoRA", "dora_not_detached": "DoRA,\nnorm not\ndetached", "full": "full\nfine-tuning"
}  # fmt: skip
PAPER = {"full": 77.3, "lora": 76.5, "dora": 77.4}  # images
PAPER_OF_DATASET = {"vl_bart_image": PAPER, "vl_bart_video": {"full": 87.5, "lora": 83.5, "dora": 85.4}}


@dataclass
class Settings:
    """What configs/vl_bart_*.yaml hold.

    Attributes:
        model: A pretrained BART, folder or Hub id; None trains a small one on the questions of `backbone_pattern`.
        dataset: The folder of the data, under `--data`.
        learning_rates: The grid of each method; DoRA's serves with and without detaching.
        pattern: Regular expression of the questions to adapt to, the whole of them.
        steps: Optimizer steps of each run; None leaves it to `epochs`.
        max_test: Test questions to answer, the first ones; None for all.
    """

    model: str | None
    dataset: str
    visual_dim: int
    visual_tokens: int
    r: int
    lora_alpha: float
    target_modules: list[str]
    learning_rates: dict[str, list[float]]
    batch: int
    seeds: list[int]
    lora_dropout: float = 0.0
    train_visual_embedding: bool = False
    warmup: float = 0.1
    steps: int | None = None
    epochs: float | None = None
    max_test: int | None = None
    pattern: str = ".*"
    backbone_pattern: str | None = None
    backbone_steps: int = 0
    backbone_batch: int = 64
    backbone_learning_rate: float = 1e-3
    d_model: int = 128
    layers: int = 2


def load_settings(path: Path) -> Settings:
    """Read a YAML file of settings; a seed that is given twice counts once.

    Raises:
        ValueError: there is no such file, it is no YAML, a field is unknown or missing, or the fields contradict each
            other.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected settings as in configs/vl_bart_easy_vqa.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected fields such as `r: 16`, found {type(values).__name__}.")
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
    try:
        settings = Settings(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    if (settings.steps is None) == (settings.epochs is None):
        raise ValueError(f"{path}: expected one of steps and epochs, found {settings.steps} and {settings.epochs}.")
    if settings.model is None and not (settings.backbone_pattern and settings.backbone_steps):
        raise ValueError(f"{path}: without a model, expected backbone_pattern and backbone_steps to train one.")
    if not settings.seeds:
        raise ValueError(f"{path}: seeds: expected at least one.")
    if len({len(settings.learning_rates.get(method, ())) for method in ("lora", "dora", "full")}) != 1:
        raise ValueError(f"{path}: learning_rates: expected as many for lora as for dora and full.")
    rates = [rate for grid in settings.learning_rates.values() for rate in grid]
    if unfit := [rate for rate in rates if not isinstance(rate, float)]:
        # YAML 1.1 reads 1e-3 as text
        raise ValueError(f"{path}: learning_rates: expected numbers such as 1.0e-3, with a point, found {unfit[0]!r}.")
    if settings.model is not None and not settings.train_visual_embedding:
        raise ValueError(
            f"{path}: train_visual_embedding: expected true with model {settings.model}, whose projection of "
            "pictures is new and would stay random."
        )
    settings.seeds = list(dict.fromkeys(settings.seeds))
    return settings


def toy(settings: Settings) -> Settings:
    """The same at toy size, with easy-vqa and a backbone of our own: nothing is fetched from the Hub."""
    small = load_settings(CONFIGS / "vl_bart_easy_vqa.yaml")
    names = ("model", "dataset", "visual_dim", "visual_tokens", "pattern", "backbone_pattern", "backbone_learning_rate")
    return replace(
        settings, **{name: getattr(small, name) for name in names}, r=min(settings.r, small.r), steps=2, epochs=None,
        backbone_steps=2, backbone_batch=4, batch=4, d_model=16, layers=1, max_test=20,
    )  # fmt: skip


class Task:
    """The data of the runs, and the model that is adapted to them.

    Raises:
        ValueError: data are missing, or no question is of the kind that a part needs.
    """

    def __init__(self, settings: Settings, options: Options) -> None:
        self.settings, self.options, self.device = settings, options, options.device
        folder = options.data / settings.dataset
        command = "Run `python scripts/prepare_easy_vqa.py` first." if settings.dataset == "easy_vqa" else (
            "scripts/vl_bart/data.py describes the format."
        )  # fmt: skip
        self.whole, test = (load_part(folder, part, command) for part in ("train", "test"))
        # held-out pictures, so that nothing trained has seen a picture that chooses the learning rate
        held_out = {record["picture"] for record in self.whole.records if record["picture"] % 10 == 0}

        def asking(part: Part, pattern: str) -> list[Record]:
            found = [record for record in part.records if re.fullmatch(pattern, record["question"])]
            if not found:
                raise ValueError(f"{folder}: no question fits the pattern {pattern!r}; expected some in both parts.")
            return found

        rest = asking(self.whole, settings.pattern)
        self.train = self.whole.select(r for r in rest if r["picture"] not in held_out)
        self.validation = self.whole.select([r for r in rest if r["picture"] in held_out][:1000])
        self.test = test.select(asking(test, settings.pattern)[: settings.max_test])
        if not self.train.records or not self.validation.records:
            raise ValueError(f"{folder}: expected questions about every tenth picture, to validate, and about others.")
        self.steps = settings.steps or round(settings.epochs * len(self.train.records) / settings.batch)  # type: ignore
        self.backbone: str | None = None
        if settings.model is None:
            pattern = str(settings.backbone_pattern)
            learnt = asking(self.whole, pattern)
            self.backbone_part = self.whole.select(r for r in learnt if r["picture"] not in held_out)
            self.backbone_test = test.select(asking(test, pattern)[:1000])
            self.backbone = f"vl_bart_backbone_{self.backbone_digest(options.dry_run)}"

    def backbone_digest(self, dry_run: bool) -> str:
        """Eight digits that differ where the weights of our own backbone do."""
        names = ("visual_dim", "visual_tokens", "warmup", "d_model", "layers", "backbone_pattern")
        names += ("backbone_steps", "backbone_batch", "backbone_learning_rate")
        depends_on = {name: getattr(self.settings, name) for name in names} | {"dry_run": dry_run}
        found = hashlib.sha256(json.dumps([depends_on, self.whole.records, self.backbone_part.records]).encode())
        found.update(self.whole.features.contiguous().view(torch.uint8).numpy())
        return found.hexdigest()[:8]

    def load_base(self, runs: Runs, total: int) -> None:
        """Load, or first train, the frozen model that every method adapts, and its tokenizer."""
        settings, folder = self.settings, self.options.data / self.settings.dataset
        files = [folder / f"{part}.{kind}" for part in ("train", "test") for kind in ("jsonl", "safetensors")]
        self.tokenizer: PreTrainedTokenizerBase
        if (name := settings.model) is not None:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.base = VlBartForConditionalGeneration.from_bart(name, settings.visual_dim, settings.visual_tokens)
        else:
            self.tokenizer = word_tokenizer(self.whole.records)
            folder = Path("outputs/reproduce") / str(self.backbone)
            if "backbone" in runs.runs and not (folder / "config.json").is_file():
                del runs.runs["backbone"]
            runs.do("backbone", lambda: self.train_backbone(folder), total)
            self.base = VlBartForConditionalGeneration.from_pretrained(folder)
            files.append(folder / "model.safetensors")  # trained again on another machine, it is another one
        self.inputs = digest(*files)
        self.base.to(self.device).requires_grad_(False)

    def train_backbone(self, folder: Path) -> dict[str, Any]:
        settings = self.settings
        shape = {name: getattr(settings, name) for name in ("d_model", "layers", "visual_dim", "visual_tokens")}
        model = build_small(self.tokenizer, **shape).to(self.device)
        how = settings.backbone_learning_rate, settings.backbone_steps, settings.backbone_batch
        loss = self.fit(model, self.backbone_part, *how, seed=0, label="backbone")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        model.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)  # at once, so that a killed run leaves no half of it under this name
        return {"loss": loss, "accuracy": self.evaluate(model, self.backbone_test)[0]}

    def fit(
        self, model: nn.Module, part: Part, rate: float, steps: int, batch_size: int, *, seed: int, label: str
    ) -> float:
        """Train, and return the mean loss of the last tenth of the steps."""
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(param_groups(model, 0.01), lr=rate)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.settings.warmup * steps), steps)
        generator, losses = torch.Generator().manual_seed(seed), []
        order = torch.empty(0, dtype=torch.int64)
        model.train()
        for _ in tqdm(range(steps), desc=label, unit="step", leave=False, disable=None):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(part.records), generator=generator)])
            chosen, order = order[:batch_size].tolist(), order[batch_size:]
            batch = make_batch(part, [part.records[i] for i in chosen], self.tokenizer)
            loss = model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return statistics.mean(losses[-max(1, steps // 10) :])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, swapped: bool = False) -> tuple[float, float]:
        """Accuracy, and mean cross-entropy per token of the answers.

        Accuracy is the share of answers each of whose tokens the model prefers: greedy generation would write just
        those. With `swapped`, each question comes with the picture of another, half of the records further on: real
        pictures, which tell nothing about the answer.
        """
        model.eval()
        right, loss, tokens, count = 0, 0.0, 0, len(part.records)
        shift = count // 2 if swapped else 0
        pictures = [part.records[(place + shift) % count]["picture"] for place in range(count)]
        for start in range(0, count, 250):
            chosen = slice(start, start + 250)
            batch = make_batch(part, part.records[chosen], self.tokenizer, pictures[chosen])
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            labels, logits = batch["labels"], model(**batch).logits
            right += int(((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1).sum())
            flat = logits.flatten(0, 1).float()
            loss += nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
            tokens += int((labels != IGNORE).sum())
        return right / len(part.records), loss / tokens

    def run(self, method: str, rate: float, seed: int, label: str) -> dict[str, Any]:
        """Adapt the base by one method and measure."""
        settings = self.settings
        torch.manual_seed(seed)
        model: Any
        if method == "full":
            model = copy.deepcopy(self.base).requires_grad_(True)
        else:
            common: dict[str, Any] = {
                "r": settings.r, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout,
                "target_modules": settings.target_modules,
                "modules_to_save": ["visual_embedding"] if settings.train_visual_embedding else None,
            }  # fmt: skip
            config = LoraConfig(**common) if method == "lora" else DoraConfig(**common, detach_norm=method == "dora")
            model = get_peft_model(share_weights(self.base), config)
        loss = self.fit(model, self.train, rate, self.steps, settings.batch, seed=seed, label=label)
        validation, validation_loss = self.evaluate(model, self.validation)
        return {
            "method": method, "rate": rate, "seed": seed, "loss": loss, "validation": validation,
            "validation_loss": validation_loss, "accuracy": self.evaluate(model, self.test)[0],
            "swapped": self.evaluate(model, self.test, swapped=True)[0],
        }  # fmt: skip


def difference(methods: Mapping[str, Mapping[str, Any]], one: str, other: str) -> dict[str, float]:
    """One method's accuracy minus another's, paired by seed: mean and 95 % interval."""
    return interval([a - b for a, b in zip(methods[one]["accuracies"], methods[other]["accuracies"], strict=True)])


def run(
    options: Options, config: Path | None = None, seeds: tuple[int, ...] | None = None, model: str | None = None
) -> None:
    """Train and measure every method, store and draw.

    Args:
        config: The settings; default configs/vl_bart_image.yaml at full size, vl_bart_easy_vqa.yaml on a laptop.
        seeds, model: In the place of those of the settings. Every method trains the projection of the pictures of a
            `model`, which is new.
    """
    default = "vl_bart_image" if options.size == "full" else "vl_bart_easy_vqa"
    settings = load_settings(config or CONFIGS / f"{default}.yaml")
    if model is not None:
        settings = replace(settings, model=model, train_visual_embedding=True)
    if options.dry_run:
        settings = toy(settings)
    chosen = list(seeds or settings.seeds)
    task = Task(settings, options)
    measured = {name: value for name, value in vars(settings).items() if name != "seeds"} | {"backbone": task.backbone}
    claim = "vl_bart_video" if settings.dataset == "vl_bart_video" else "vl_bart"  # another claim of the paper
    runs = Runs(claim, options, measured)
    total = len(METHODS) * (len(settings.learning_rates["lora"]) + len(chosen) - 1) + (settings.model is None)
    task.load_base(runs, total)
    methods: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        rates = settings.learning_rates["dora" if method.startswith("dora") else method]

        def do(rate: float, seed: int, method: str = method) -> dict[str, Any]:
            key = f"{method} lr={rate:g} seed={seed}"
            return runs.do(key, lambda: task.run(method, rate, seed, key), total, task.inputs)

        tried = {rate: do(rate, chosen[0]) for rate in rates}
        losses = {rate: result["validation_loss"] for rate, result in tried.items()}
        best = lowest(losses)[0]
        found = [tried[best], *(do(best, seed) for seed in chosen[1:])]
        accuracies = [result["accuracy"] for result in found]
        methods[method] = {
            "rate": best,
            "edge": at_edge(best, rates),
            "validation_loss_by_rate": {f"{rate:g}": loss for rate, loss in losses.items()},
            "accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if len(found) > 1 else 0.0,
            "swapped": statistics.mean(result["swapped"] for result in found),
        }
    summary = {
        "methods": methods,
        "differences": {
            f"dora - {other}": difference(methods, "dora", other) for other in ("lora", "full", "dora_not_detached")
        },
        "question_only": question_only(task.train.records, task.test.records),
        "before": task.evaluate(task.base, task.test)[0],
        "num_test": len(task.test.records),
        "num_validation": len(task.validation.records),
    }
    runs.finish(summary)
    draw(runs)
    print_summary(summary)


def print_summary(summary: Mapping[str, Any]) -> None:
    for method, entry in summary["methods"].items():
        rate = f"{entry['rate']:g}{', at the edge of its grid,' if entry['edge'] else ''}"
        print(
            f"{method:<18} lr {rate} accuracy {entry['mean']:.1%} +- {entry['spread']:.1%}, with other pictures "
            f"{entry['swapped']:.1%}"
        )
    for name, gain in summary["differences"].items():
        low, high = 100 * gain["low"], 100 * gain["high"]
        print(f"{name}: {100 * gain['mean']:+.1f} points [{low:+.1f}, {high:+.1f}], {gain['count']} seeds")
    print(
        f"question alone {summary['question_only']:.1%}, before adaptation {summary['before']:.1%}, "
        f"{summary['num_test']} test questions, {summary['num_validation']} to choose the rate by"
    )


def draw(runs: Runs) -> None:
    """Accuracy of each method against guessing from the question, and the difference to LoRA; a point a seed."""
    from matplotlib.figure import Figure

    summary: Mapping[str, Any] = runs.content["summary"]
    methods, dataset = summary["methods"], runs.content["settings"]["dataset"]
    paper = PAPER_OF_DATASET.get(dataset, {})  # elsewhere they would invite a comparison of unlike data
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (method, entry) in enumerate(methods.items()):
        bar = left.bar(place, 100 * entry["mean"], 0.6, color=f"C{place}", alpha=0.6)
        label = f"{100 * entry['mean']:.1f}" + (f"\n(paper {paper[method]})" if method in paper else "")
        left.bar_label(bar, [label], padding=7, fontsize=10)
        left.plot([place] * len(entry["accuracies"]), [100 * a for a in entry["accuracies"]], "k.", markersize=5)
        cross = "another's picture" if place == 0 else None
        left.plot(place, 100 * entry["swapped"], "x", color="black", markersize=8, label=cross)
    left.axhline(100 * summary["question_only"], color="k", linestyle="--", linewidth=1, label="question alone")
    left.set(title="test questions answered rightly", ylabel="%", ylim=(0, 140 if paper else 124))
    left.set_yticks(range(0, 101, 20))

    others = [method for method in methods if method != "lora"]
    for place, method in enumerate(others):
        gain, colour = difference(methods, method, "lora"), f"C{place + 1}"
        pairs = zip(methods[method]["accuracies"], methods["lora"]["accuracies"], strict=True)
        mean, low, high = (100 * gain[name] for name in ("mean", "low", "high"))
        errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]  # rounding could make -1e-15 of 0
        names = ("mean, 95 % interval", "a seed") if place == 0 else (None, None)
        right.errorbar(place, mean, errors, fmt="o", color=colour, capsize=6, linewidth=2, label=names[0])
        right.plot([place + 0.2] * gain["count"], [100 * (a - b) for a, b in pairs], "k.", label=names[1])
        right.annotate(f"{mean:+.1f}", (place - 0.1, mean), ha="right", va="center", fontsize=10)
    right.axhline(0, color="C0", linestyle="--", linewidth=1, label="LoRA")
    right.set(title="difference to LoRA with the same seed", ylabel="points", xlim=(-0.6, len(others) - 0.4))
    for axes, shown in ((left, list(methods)), (right, others)):
        axes.set_xticks(range(len(shown)), [METHODS[method] for method in shown], fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    left.legend(loc="upper center", ncols=2, fontsize=9)
    right.legend(fontsize=9)
    figure.suptitle(f"VL-BART on {dataset}: {summary['num_test']} test questions, {gain['count']} seeds")
    path = runs.path.with_suffix(".png")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    print(f"wrote {path}")
