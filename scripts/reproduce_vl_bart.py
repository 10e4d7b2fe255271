"""VL-BART answers questions about pictures, adapted by LoRA, by DoRA with and without detaching, and in full.

Called by `scripts/reproduce.py vl_bart`; the settings are those of configs/vl_bart_*.yaml. Where no pretrained BART is
at hand, a small one is first trained in full on some kinds of questions and kept in outputs/reproduce; each method then
adapts it to another kind. A grid of learning rates of equal size is tried for each method with the first seed, on
training pictures that are held out; the best rate gets all seeds. Reported is the accuracy on the test part, beside
that of guessing from the question alone and of the adapted model with empty pictures.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from benchmark_common import replacing
from benchmark_models import share_weights
from dora_peft import DoraConfig, param_groups
from reproduce_common import Options, Runs
from vl_bart_data import IGNORE, Part, Record, load_part, make_batch, question_only, word_tokenizer
from vl_bart_model import VlBartConfig, VlBartForConditionalGeneration

CONFIGS = Path(__file__).parent.parent / "configs"
METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "dora_not_detached": "DoRA,\nnorm not\ndetached",
    "full": "full\nfine-tuning",
}
PAPER = {"full": 77.3, "lora": 76.5, "dora": 77.4}


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
    backbone_learning_rate: float = 1e-3
    d_model: int = 128
    layers: int = 2


def load_settings(path: Path) -> Settings:
    """Read a YAML file of settings.

    Raises:
        ValueError: there is no such file, a field is unknown or missing, or the fields contradict each other.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected settings as in configs/vl_bart_easy_vqa.yaml.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
    try:
        settings = Settings(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    if (settings.steps is None) == (settings.epochs is None):
        raise ValueError(f"{path}: expected one of steps and epochs, found {settings.steps} and {settings.epochs}.")
    if settings.model is None and not (settings.backbone_pattern and settings.backbone_steps):
        raise ValueError(f"{path}: without a model, expected backbone_pattern and backbone_steps to train one.")
    if len({len(settings.learning_rates.get(method, ())) for method in ("lora", "dora", "full")}) != 1:
        raise ValueError(f"{path}: learning_rates: expected as many for lora as for dora and full.")
    return settings


class Task:
    """The data of a run, and the model that is adapted to them."""

    def __init__(self, settings: Settings, options: Options, runs: Runs) -> None:
        self.settings, self.device = settings, options.device
        folder = options.data / settings.dataset
        command = "Run `python scripts/prepare_easy_vqa.py` first." if settings.dataset == "easy_vqa" else (
            "scripts/vl_bart_data.py describes the format."
        )  # fmt: skip
        whole, test = (load_part(folder, part, command) for part in ("train", "test"))
        # held-out pictures, so that no question about a picture of training chooses the learning rate
        held_out = {record["picture"] for record in whole.records if record["picture"] % 10 == 0}

        def asking(part: Part, pattern: str | None) -> list[Record]:
            return [r for r in part.records if pattern is not None and re.fullmatch(pattern, r["question"])]

        rest, first = asking(whole, settings.pattern), asking(whole, settings.backbone_pattern)
        self.train = whole.select(r for r in rest if r["picture"] not in held_out)
        self.validation = whole.select([r for r in rest if r["picture"] in held_out][:1000])
        self.test = test.select(asking(test, settings.pattern)[: settings.max_test])
        self.backbone_part = whole.select(first)
        self.backbone_test = test.select(asking(test, settings.backbone_pattern)[:1000])
        self.steps = settings.steps or round(settings.epochs * len(self.train.records) / settings.batch)  # type: ignore
        self.tokenizer: PreTrainedTokenizerBase
        if settings.model is not None:
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
            shape = (settings.visual_dim, settings.visual_tokens)
            self.base = VlBartForConditionalGeneration.from_bart(settings.model, *shape)
        else:
            self.tokenizer = word_tokenizer(whole.records)
            self.base = self.own_backbone(runs)
        self.base.to(self.device).requires_grad_(False)

    def own_backbone(self, runs: Runs) -> VlBartForConditionalGeneration:
        """The small BART that an earlier run left, or one trained now."""
        folder = Path("outputs/reproduce") / f"{runs.path.stem}_backbone"
        if "backbone" in runs.runs and not (folder / "config.json").is_file():
            del runs.runs["backbone"]
        runs.do("backbone", lambda: self.train_backbone(folder))
        return VlBartForConditionalGeneration.from_pretrained(folder)

    def train_backbone(self, folder: Path) -> dict[str, Any]:
        settings, tokens = self.settings, self.tokenizer
        torch.manual_seed(0)
        shape = {
            "d_model": settings.d_model,
            "visual_dim": settings.visual_dim,
            "visual_tokens": settings.visual_tokens,
        }
        shape |= {f"{side}_layers": settings.layers for side in ("encoder", "decoder")}
        shape |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
        shape |= {f"{side}_ffn_dim": 4 * settings.d_model for side in ("encoder", "decoder")}
        ids = {
            "pad_token_id": tokens.pad_token_id,
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
        }
        ids |= {"decoder_start_token_id": tokens.eos_token_id, "forced_eos_token_id": None}
        config = VlBartConfig(vocab_size=len(tokens), max_position_embeddings=128, dropout=0.0, **shape, **ids)
        model = VlBartForConditionalGeneration(config).to(self.device)
        loss = self.fit(model, self.backbone_part, settings.backbone_learning_rate, settings.backbone_steps, seed=0)
        model.save_pretrained(folder)
        return {"loss": loss, "accuracy": self.accuracy(model, self.backbone_test)}

    def fit(self, model: nn.Module, part: Part, rate: float, steps: int, seed: int) -> float:
        """Train, and return the mean loss of the last tenth of the steps."""
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(param_groups(model, 0.01), lr=rate)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.settings.warmup * steps), steps)
        generator, losses = torch.Generator().manual_seed(seed), []
        order = torch.empty(0, dtype=torch.int64)
        model.train()
        for _ in range(steps):
            if len(order) < self.settings.batch:
                order = torch.cat([order, torch.randperm(len(part.records), generator=generator)])
            chosen, order = order[: self.settings.batch].tolist(), order[self.settings.batch :]
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
    def accuracy(self, model: nn.Module, part: Part, blank: bool = False) -> float:
        """The share of answers each of whose tokens the model prefers: greedy generation would write just those."""
        model.eval()
        right = 0
        for start in range(0, len(part.records), 250):
            batch = make_batch(part, part.records[start : start + 250], self.tokenizer, blank)
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            found = model(**batch).logits.argmax(-1)
            right += int(((found == batch["labels"]) | (batch["labels"] == IGNORE)).all(1).sum())
        return right / len(part.records)

    def run(self, method: str, rate: float, seed: int) -> dict[str, Any]:
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
        loss = self.fit(model, self.train, rate, self.steps, seed)
        return {
            "method": method, "rate": rate, "seed": seed, "loss": loss,
            "validation": self.accuracy(model, self.validation), "accuracy": self.accuracy(model, self.test),
            "blank": self.accuracy(model, self.test, blank=True),
        }  # fmt: skip


def run(options: Options, config: Path | None = None, seeds: tuple[int, ...] | None = None) -> None:
    """Train and measure every method, store and draw."""
    default = "vl_bart_image" if options.size == "full" else "vl_bart_easy_vqa"
    settings = load_settings(config or CONFIGS / f"{default}.yaml")
    if options.dry_run:
        settings.steps, settings.backbone_steps, settings.batch, settings.d_model, settings.layers = 2, 2, 4, 16, 1
        settings.max_test = 20
    measured = {name: value for name, value in vars(settings).items() if name != "seeds"}
    runs = Runs("vl_bart", options, measured)
    chosen = list(seeds or settings.seeds)
    task = Task(settings, options, runs)
    total = len(METHODS) * (len(settings.learning_rates["lora"]) + len(chosen) - 1) + (settings.model is None)
    methods = {}
    for method in METHODS:
        rates = settings.learning_rates["dora" if method.startswith("dora") else method]

        def do(rate: float, seed: int, method: str = method) -> dict[str, Any]:
            return runs.do(f"{method} lr={rate:g} seed={seed}", lambda: task.run(method, rate, seed), total)

        tried = {rate: do(rate, chosen[0])["validation"] for rate in rates}
        best = max(tried, key=lambda rate: tried[rate])
        found = [do(best, seed) for seed in chosen]
        accuracies = [result["accuracy"] for result in found]
        methods[method] = {
            "rate": best,
            "accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if len(found) > 1 else 0.0,
            "blank": statistics.mean(result["blank"] for result in found),
        }
    before = task.accuracy(task.base, task.test)
    guess = question_only(task.train.records, task.test.records)
    runs.finish({"methods": methods, "question_only": guess, "before": before, "paper": PAPER})
    draw(runs)
    for method, entry in methods.items():
        print(
            f"{method:<18} lr {entry['rate']:<6g} accuracy {entry['mean']:.1%} +- {entry['spread']:.1%}, "
            f"with empty pictures {entry['blank']:.1%}"
        )
    print(f"question alone {guess:.1%}, before adaptation {before:.1%}, {len(task.test.records)} test questions")


def draw(runs: Runs) -> None:
    """Accuracy of each method, every seed as a point, against guessing from the question."""
    from matplotlib.figure import Figure

    summary: Mapping[str, Any] = runs.content["summary"]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for place, (method, entry) in enumerate(summary["methods"].items()):
        bar = axes.bar(place, 100 * entry["mean"], 0.6, color=f"C{place}", alpha=0.75)
        label = f"{100 * entry['mean']:.1f} %" + (f"\n(paper {PAPER[method]})" if method in PAPER else "")
        axes.bar_label(bar, [label], padding=8, fontsize=8)
        axes.plot([place] * len(entry["accuracies"]), [100 * a for a in entry["accuracies"]], "k.")
        axes.plot(place, 100 * entry["blank"], "x", color="tab:red", label="empty pictures" if place == 0 else None)
    axes.axhline(100 * summary["question_only"], color="grey", linestyle="--", label="question alone")
    axes.set_xticks(range(len(summary["methods"])), [METHODS[method] for method in summary["methods"]])
    axes.set(title=f"VL-BART, {runs.content['settings']['dataset']}: test questions answered rightly", ylabel="%")
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="lower right", fontsize=8)
    path = runs.path.with_suffix(".png")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    print(f"wrote {path}")
