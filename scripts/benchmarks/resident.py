"""The suite `resident` of `scripts/benchmark.py`: what an adapter's operations add to the memory of a process."""

from __future__ import annotations

import gc
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

import dora_peft
from benchmarks.bases import DTYPES, SHAPES, build_at_once
from benchmarks.footprint import in_process
from benchmarks.measure import Result, Skipped, random_tokens, summarize
from common.memory import MIB

OPERATIONS = ("get_peft_model", "forward", "load_adapter", "merge_and_unload")
METHODS = ("lora", "peft_dora", "dora")


def run_resident(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """What each of `OPERATIONS` adds, in this order, to the resident memory of a process that holds the model."""
    if options.device.type != "cpu":
        raise ValueError(f"the suite resident is about the heap of a CPU, found --device {options.device}")
    names = [name for name in options.contenders if name in METHODS]
    setting = {
        "rank": options.rank[0],
        "batch": options.batch,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
    }
    found: dict[str, dict[str, list[float]]] = {operation: {n: [] for n in names} for operation in OPERATIONS}
    for _ in tqdm(range(options.repeats), desc="resident", unit="repeat", disable=None):
        for name in names:
            for operation, mib in in_process("resident", name, options, setting).items():
                found[operation][name].append(mib)
    for operation, values in found.items():
        yield summarize("resident_mib", setting | {"operation": operation}, values)


def anonymous_mib() -> float:
    """The memory of this process that is no file's."""
    gc.collect()
    used = psutil.Process().memory_info()
    return (used.rss - getattr(used, "shared", 0)) / MIB


def measure_resident(options: Namespace) -> dict[str, float]:
    """The other side of `run_resident`: the MiB that each operation adds."""
    base = build_at_once(SHAPES[options.model], options.layers, options.vocab, DTYPES[options.dtype], options.seed)
    (tokens,) = random_tokens(options, 1, options.seq_len)
    rank, added = options.rank[0], dict[str, float]()
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    before = anonymous_mib()

    def note(operation: str) -> None:
        nonlocal before
        now = anonymous_mib()
        added[operation], before = now - before, now

    if options.worker == "dora":
        model: Any = get_peft_model(base, dora_peft.DoraConfig(**settings))  # type: ignore[arg-type]
    else:
        model = get_peft_model(base, LoraConfig(**settings, use_dora=options.worker == "peft_dora"))
    note("get_peft_model")
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    note("forward")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        before = anonymous_mib()
        model.load_adapter(Path(folder), "second")
        note("load_adapter")
    # a name for the merged model, which has to stay
    merged = model.merge_and_unload()
    del model, base
    note("merge_and_unload")
    del merged
    return {operation: added[operation] for operation in OPERATIONS}
