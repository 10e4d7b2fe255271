"""Memory and speed of LoRA, PEFT's `use_dora`, and this package's DoRA with the norm detached and not, on one YAML.

    python scripts/benchmark_memory.py CONFIG.yaml [--steps 10] [--json FILE] [--plot FILE] [--field value ...]

On a laptop without GPU, with the model and the data of `scripts/prepare_smollm2.py` and `scripts/prepare_cmudict.py`:

    python scripts/benchmark_memory.py configs/smollm2_135m.yaml --steps 5

Every method runs in a separate process, on the same batches. Expected result: a table with one line a method and,
beside each figure, its ratio to LoRA's; the same as JSON; and a bar chart. "saved" is what autograd keeps from forward
to backward: distinct storages, without parameters and buffers. "peak" is the allocator's peak on a GPU; on the CPU it
is the growth of the resident set over the loaded model, read every 2 ms. Times are medians over the steps after two of
warm-up.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainingArguments, set_seed

import dora_peft
from benchmarks.measure import enable_checkpointing
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from common.memory import MIB, PeakMemory, record_saved_bytes
from common.plots import COLORS, save_figure
from finetune.arguments import DataArguments, ModelArguments
from finetune.data import AnswerCollator, load_datasets
from finetune.model import build_model, count_parameters, load_tokenizer
from finetune.options import USUAL_TRAINING, build_parser

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "peft_dora": {"method": "peft_dora"},
    "dora": {"method": "dora", "detach_norm": True},
    "dora_not_detached": {"method": "dora", "detach_norm": False},
}
WARMUP_STEPS = 2
Batch = dict[str, torch.Tensor]


def make_steps(args: TrainingArguments, dataset: Any, pad_token_id: int, count: int) -> list[list[Batch]]:
    """The batches of `count` optimizer steps, in the order of the data, from the start again when it ends."""
    collate, size = AnswerCollator(pad_token_id), args.per_device_train_batch_size
    batches = [
        collate([dataset[i % len(dataset)] for i in range(first, first + size)])
        for first in range(0, count * args.gradient_accumulation_steps * size, size)
    ]
    per_step = args.gradient_accumulation_steps
    return [batches[i : i + per_step] for i in range(0, len(batches), per_step)]


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding left out; a packed batch has next to none."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def choose_device(args: TrainingArguments) -> torch.device:
    """The GPU if there is one and `use_cpu` does not forbid it."""
    return torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")


def measure(
    model_args: ModelArguments, data: DataArguments, args: TrainingArguments, num_steps: int, label: str
) -> dict[str, Any]:
    """Train for some steps and measure them.

    Returns:
        `trainable_parameters`, `saved_mib`, `peak_mib`, medians `time_s` and `tokens_per_s`, `step_times_s`,
        `first_loss` and `last_loss`.
    """
    tokenizer = load_tokenizer(model_args)
    dataset, _ = load_datasets(dataclasses.replace(data, eval_dataset=None, eval_size=0), tokenizer, args.seed)
    steps = make_steps(args, dataset, tokenizer.pad_token_id, WARMUP_STEPS + num_steps)
    device = choose_device(args)
    set_seed(args.seed)
    model = build_model(model_args, tokenizer).to(device).train()
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    lr_magnitude = model_args.lr_magnitude if model_args.method == "dora" else None
    groups = dora_peft.param_groups(model, args.weight_decay, lr_magnitude)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    memory, times, rates, losses = PeakMemory(device), [], [], []
    saved_mib = 0.0
    for index, batches in enumerate(tqdm(steps, desc=label, unit="step")):
        if index == 1:
            memory.start()
        start = time.perf_counter()
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            # Only in the first step, which counts for neither time nor peak: hooks cost some of both.
            recorder = record_saved_bytes(model) if index == 0 else contextlib.nullcontext({})
            with recorder as saved, autocast:
                loss = model(**batch, use_cache=False).loss / len(batches)
            saved_mib = max(saved_mib, sum(saved.values()) / MIB)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * len(batches))
        if index >= WARMUP_STEPS:
            times.append(time.perf_counter() - start)
            rates.append(sum(map(count_tokens, batches)) / times[-1])
    memory.stop()
    return {
        "trainable_parameters": count_parameters(model)[0],
        "saved_mib": saved_mib,
        "peak_mib": memory.peak_bytes / MIB,
        "time_s": statistics.median(times),
        "tokens_per_s": statistics.median(rates),
        "step_times_s": times,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def run_worker(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Measure one method in a separate process, so that none inherits another's memory."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *argv, "--worker", name, "--json", str(result)]
        status = subprocess.run(command).returncode
        if status != 0:
            raise RuntimeError(f"{name}: the benchmark's process ended with status {status}; its message stands above.")
        return json.loads(result.read_text(encoding="utf-8"))


def check_losses(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all methods start from the same function: an adapter at initialisation leaves the model as it is.

    Raises:
        RuntimeError: if a method's first loss differs from the first method's by more than 1 %.
    """
    expected = next(iter(results.values()))["first_loss"]
    for name, result in results.items():
        if abs(result["first_loss"] - expected) > 0.01 * abs(expected):
            raise RuntimeError(
                f"{name}: expected the first loss {expected:.4f} of the others, found {result['first_loss']:.4f}; "
                "the figures cannot be compared."
            )


COLUMNS = {
    "trainable_parameters": ("trainable", "{:,.0f}"),
    "peak_mib": ("peak MiB", "{:,.1f}"),
    "saved_mib": ("saved MiB", "{:,.1f}"),
    "time_s": ("s/step", "{:.3f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
}


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a method; beside each figure its ratio to LoRA's, if LoRA was measured."""
    rows = [["method", *(title for title, _ in COLUMNS.values())]]
    for name, result in results.items():
        row = [name]
        for key, (_, template) in COLUMNS.items():
            cell = template.format(result[key])
            reference = results.get("lora", {}).get(key)
            row.append(f"{cell} ({result[key] / reference:.2f}x)" if reference else cell)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw_bars(results: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Peak memory, bytes saved for backward and time per step, one bar a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title)
    panels = {"peak_mib": "peak memory, MiB", "saved_mib": "saved for backward, MiB", "time_s": "seconds per step"}
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        names = [name.replace("_", "\n", 1) for name in results]
        # as the method of which it is a variant
        colors = [COLORS[name.removesuffix("_not_detached")] for name in results]
        bars = axes.bar(names, [result[key] for result in results.values()], color=colors)
        axes.bar_label(bars, fmt="%.4g")
        axes.set_title(label)
        axes.margins(y=0.15)
    save_figure(figure, path)


def read_variants(text: str) -> list[str]:
    """Split the list of methods.

    Raises:
        argparse.ArgumentTypeError: naming a method that does not exist.
    """
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}, expected some of {','.join(VARIANTS)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=10, help="optimizer steps to time (default 10)")
    parser.add_argument("--methods", type=read_variants, default=list(VARIANTS), help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--json", type=Path, help="where to write the figures (default: memory.json in output_dir)")
    parser.add_argument("--plot", type=Path, help="where to draw the bar chart (default: memory.png in output_dir)")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    model, data, args, options = parser.parse(argv)
    if options.worker is not None:
        model = dataclasses.replace(model, **VARIANTS[options.worker])
        figures = measure(model, data, args, options.steps, options.worker)
        options.json.write_text(json.dumps(figures), encoding="utf-8")
        return

    results = {name: run_worker(name, argv) for name in options.methods}
    check_losses(results)
    device = choose_device(args)
    machine = describe_machine(device)
    json_path = options.json or Path(args.output_dir) / "memory.json"
    training = {name: value for name, value in args.to_dict().items() if name in USUAL_TRAINING}
    config = dataclasses.asdict(model) | dataclasses.asdict(data) | training
    report = {**machine, "steps": options.steps, "config": config, "methods": results}
    write_json(json_path, report)
    plot_path = options.plot or Path(args.output_dir) / "memory.png"
    draw_bars(results, f"{Path(model.model_name_or_path).name}, r={model.r}, {machine['device']}", plot_path)
    print(format_table(results))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    peak = "peak of the allocator" if device.type == "cuda" else "growth of the resident set over the loaded model"
    print(f"peak: {peak}; saved: kept from forward to backward; s/step: median of {options.steps}")
    print(f"{machine['device']}, threads {machine['threads']}; {versions}; commit {machine['commit'] or 'unknown'}")
    print(f"wrote {json_path} and {plot_path}")


if __name__ == "__main__":
    main()
