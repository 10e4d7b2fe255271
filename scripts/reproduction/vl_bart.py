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
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from benchmarks.bases import share_weights
from common.files import digest, replacing
from dora_peft import DoraConfig, param_groups
from reproduction.common import Options, Runs, at_edge, lowest
from reproduction.vl_bart_figure import METHODS, difference, draw, print_summary
from reproduction.vl_bart_settings import CONFIGS, Settings, load_settings, toy
from vl_bart.data import IGNORE, Part, Record, load_part, make_batch, question_only, word_tokenizer
from vl_bart.model import VlBartForConditionalGeneration, build_small


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
        """Eight digits that differ if the weights of our own backbone do."""
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
            # trained again on another machine, it is another one
            files.append(folder / "model.safetensors")
        self.inputs = digest(*files)
        self.base.to(self.device).requires_grad_(False)

    def train_backbone(self, folder: Path) -> dict[str, Any]:
        settings = self.settings
        shape = {name: getattr(settings, name) for name in ("d_model", "layers", "visual_dim", "visual_tokens")}
        model = build_small(self.tokenizer, **shape).to(self.device)
        how = settings.backbone_learning_rate, settings.backbone_steps, settings.backbone_batch
        loss = self.fit(model, self.backbone_part, *how, seed=0, label="backbone")
        with replacing(folder) as temporary:
            model.save_pretrained(temporary)
            # Without an older folder the new one gets its name at once, and a killed run leaves no half of it.
            shutil.rmtree(folder, ignore_errors=True)
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
        pictures, which say nothing about the answer.
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
    # another claim of the paper
    claim = "vl_bart_video" if settings.dataset == "vl_bart_video" else "vl_bart"
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
