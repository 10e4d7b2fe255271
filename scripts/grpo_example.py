"""Reinforcement learning by TRL's GRPOTrainer with DoRA and with LoRA at equal settings: a small LLaMA that pronounces.

    python scripts/prepare_smollm2.py && python scripts/prepare_cmudict.py
    python scripts/grpo_example.py                      # SmolLM2-135M, one seed; made for 15 minutes on 2 CPU cores
    python scripts/grpo_example.py --seeds 0,1          # two seeds; what is measured already is kept
    python scripts/grpo_example.py --results scripts/grpo_results       # as README's curve

In seconds, to see that everything runs:

    python scripts/grpo_example.py --warmup_steps 1 --steps 1 --words 8 --output_dir outputs/grpo_short

The model reads a spelled word ("Say w i n d o w:") and is rewarded for the phonemes that it gets right, which a
dictionary verifies: 1 for "W IH N D OW", less for each phoneme that is wrong, missing or too many, at least 0. Without
any training it never is right, and a reward that is always 0 teaches nothing; so both methods start from the same
model, fine-tuned for a few steps and merged. From there on only the answers that it samples are rewarded.

Expected result: for each method and seed the mean reward of the first and last ten steps, and, for greedy answers to
held-out words before and after, the share that is right in full and the share of wrong phonemes; all of it as grpo.json
and grpo.png in --results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from common.plots import COLORS, LABELS, save_figure
from common.spelling import edit_distance, read_records, score
from dora_peft import DoraConfig
from finetune.generation import generate_answers

METHODS = {"lora": LoraConfig, "dora": DoraConfig}
# Words of 9 letters have at most 16 tokens of phonemes.
MAX_TOKENS = 20
# Of a mean at the beginning and the end of training.
WINDOW = 10


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="data/smollm2")
    parser.add_argument("--gguf_file", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="empty if it is no GGUF file")
    parser.add_argument("--data", type=Path, default=Path("data/cmudict"), help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--seeds", type=seeds, default=[0], help="separated by commas (0)")
    parser.add_argument("--warmup_steps", type=positive, default=25, help="of supervised fine-tuning, before (25)")
    parser.add_argument("--steps", type=positive, default=60, help="of GRPO, for each method (60)")
    parser.add_argument("--prompts", type=positive, default=4, help="of a step (4)")
    parser.add_argument("--generations", type=positive, default=8, help="answers to each prompt, at least 2 (8)")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--words", type=positive, default=200, help="held-out words to measure on (200)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/grpo"))
    parser.add_argument("--results", type=Path, help="folder of grpo.json and grpo.png (--output_dir)")
    options = parser.parse_args(argv)
    if options.generations < 2:
        parser.error("--generations: GRPO compares the answers to a prompt with each other, so it needs 2 or more")
    return options


def seeds(text: str) -> list[int]:
    """Seeds from a command line, separated by commas."""
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, found {text!r}") from None


def reward(completions: Sequence[str], expected: Sequence[str], **_: Any) -> list[float]:
    """1 for the phonemes that the dictionary has, less by each error's share of them, at least 0."""
    rewards = []
    for found, wanted in zip(completions, expected, strict=True):
        phonemes = wanted.split()
        rewards.append(max(0.0, 1 - edit_distance(found.split(), phonemes) / len(phonemes)))
    return rewards


def load(folder: str | Path, gguf_file: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in fp32 and its tokenizer, which pads on the left as generation wants it."""
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if gguf_file and hasattr(transformers, "GgufConfig"):
        # transformers 5.23 and newer would hand out a model that it calls quantised, and refuses to train
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source), tokenizer


def common(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """What both trainers are told alike."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "disable_tqdm": False,
    }


def adapter(kind: type[LoraConfig], options: argparse.Namespace) -> LoraConfig:
    """The method's config; the same for both but for its type."""
    return kind(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def source(options: argparse.Namespace) -> dict[str, Any]:
    """What the model that both methods start from is made of."""
    names = ("model_name_or_path", "gguf_file", "warmup_steps")
    return {**{name: getattr(options, name) for name in names}, "data": str(options.data)}


def warm_up(options: argparse.Namespace, seed: int) -> Path:
    """The folder of the model that both methods start from: fine-tuned for a few steps with LoRA, and merged."""
    folder, wanted = options.output_dir / f"start_{seed}", {**source(options), "rank": options.rank, "seed": seed}
    # written last, so that it says what is whole
    made = folder / "made_of.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == wanted:
        return folder
    made.unlink(missing_ok=True)
    model, tokenizer = load(options.model_name_or_path, options.gguf_file)
    records = read_records(options.data / "train.jsonl", 32 * options.warmup_steps)
    arguments = SFTConfig(
        **common(options, folder, seed), max_steps=options.warmup_steps, per_device_train_batch_size=32,
        learning_rate=2e-3, completion_only_loss=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(records), processing_class=tokenizer,
        peft_config=adapter(LoraConfig, options),
    )  # fmt: skip
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(made, wanted)
    return folder


def accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, records: Sequence[dict[str, str]]) -> dict[str, float]:
    """Of greedy answers to held-out words."""
    model.eval()
    tokenizer.padding_side = "left"
    answers = generate_answers(model, tokenizer, [r["prompt"] for r in records], 50, MAX_TOKENS)
    return score(answers, [r["completion"] for r in records])


def train(options: argparse.Namespace, method: str, seed: int, start: Path) -> dict[str, Any]:
    """One run of GRPO: the mean reward of each step, and the accuracy before and after."""
    set_seed(seed)
    model, tokenizer = load(start)
    held_out = read_records(options.data / "test.jsonl", options.words)
    before = accuracy(model, tokenizer, held_out)
    # not those of the warm-up
    records = read_records(options.data / "train.jsonl")[32 * options.warmup_steps :]
    if not records:
        raise SystemExit(
            f"error: {options.data / 'train.jsonl'}: {32 * options.warmup_steps} records are for the warm-up, and none "
            "is left for GRPO; choose fewer --warmup_steps."
        )
    dataset = Dataset.from_list([{"prompt": r["prompt"], "expected": r["completion"]} for r in records])
    arguments = GRPOConfig(
        **common(options, options.output_dir / f"{method}_{seed}", seed), max_steps=options.steps,
        per_device_train_batch_size=options.prompts * options.generations, num_generations=options.generations,
        max_completion_length=MAX_TOKENS, learning_rate=options.learning_rate,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=arguments, train_dataset=dataset, processing_class=tokenizer,
        peft_config=adapter(METHODS[method], options),
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    after = accuracy(trainer.model, tokenizer, held_out)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "method": method, "seed": seed, "rewards": rewards, "seconds_per_step": seconds / options.steps,
        "before": before, "after": after,
    }  # fmt: skip


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a stored run has to share with a wanted one."""
    names = ("steps", "prompts", "generations", "learning_rate", "rank", "words")
    return {**source(options), **{name: getattr(options, name) for name in names}}


def format_row(run: dict[str, Any]) -> str:
    first, last = (statistics.mean(part) for part in (run["rewards"][:WINDOW], run["rewards"][-WINDOW:]))
    exact, errors = (
        f"{run['before'][name]:.1%} -> {run['after'][name]:.1%}" for name in ("exact_match", "phoneme_error_rate")
    )
    return (
        f"{LABELS[run['method']]:<10} seed {run['seed']}   reward {first:.3f} -> {last:.3f}   exact match {exact}   "
        f"phoneme errors {errors}   {run['seconds_per_step']:.1f} s/step"
    )


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The reward of each step, averaged over a window, one line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for style, seed in zip(["-", "--", ":", "-."], sorted({run["seed"] for run in runs}), strict=False):
        for run in (run for run in runs if run["seed"] == seed):
            width = min(WINDOW, len(run["rewards"]))
            means = [statistics.mean(run["rewards"][i : i + width]) for i in range(len(run["rewards"]) - width + 1)]
            label = f"{LABELS[run['method']]}, seed {seed}"
            axes.plot(range(width, len(means) + width), means, style, color=COLORS[run["method"]], label=label)
    axes.set_xlabel("step of GRPO")
    axes.set_ylabel(f"reward, mean of {WINDOW} steps")
    axes.legend()
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    # of libraries about each other's coming changes
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = options.results or options.output_dir
    path, wanted = results / "grpo.json", settings(options)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    runs = stored.get("runs", []) if stored.get("settings") == wanted else []
    for seed in options.seeds:
        start = warm_up(options, seed)
        for method in METHODS:
            if any(run["method"] == method and run["seed"] == seed for run in runs):
                continue
            machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            runs.append({**train(options, method, seed, start), "machine": machine})
            write_json(path, {"settings": wanted, "runs": runs})
    draw(runs, results / "grpo.png")
    for run in runs:
        print(format_row(run))
    print(f"wrote {path} and {results / 'grpo.png'}")


if __name__ == "__main__":
    main()
