"""The suite `memory` of `scripts/benchmark.py`: bytes kept for backward, and peak memory of training steps."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bases import DTYPES
from benchmarks.contenders import Contender, build_contender
from benchmarks.measure import (
    Result,
    Skipped,
    build_contenders,
    build_model,
    check_contenders,
    compute_loss,
    observe_gradients,
    prepare_training,
    random_tokens,
    summarize,
    train,
)
from benchmarks.partial import known_results
from common.memory import MIB, PeakMemory, saved_bytes

PEAK_STEPS = 3


def run_memory(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """Bytes kept for backward in fp32, in bf16 under an fp32 adapter and all in bf16; peak memory of training steps."""
    batches = random_tokens(options, 1, options.seq_len)
    for dtype, adapter_dtype in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
        base = build_model(options, dtype)
        for rank, dropout, checkpointing in itertools.product(options.rank, options.dropout, options.checkpointing):
            setting = {
                "rank": rank,
                "dropout": dropout,
                "batch": options.batch,
                "seq_len": options.seq_len,
                "dtype": dtype,
                "adapter_dtype": adapter_dtype,
                "checkpointing": checkpointing,
            }
            peak = options.peak and not (options.device.type == "cpu" and dtype != "fp32")
            if known := list(known_results(options, setting, "saved_mib", *["peak_mib"] * peak)):
                yield from known
                continue
            contenders = build_contenders(base, options, skipped, rank, dropout, adapter_dtype)
            optimizers = {name: prepare_training(c, checkpointing) for name, c in contenders.items()}
            checked = check_contenders(contenders, lambda c: observe_gradients(c, batches[0]), dtype, skipped)
            saved = {}
            for name, contender in contenders.items():
                with contender.context():
                    saved[name] = [saved_bytes(lambda c=contender: compute_loss(c, batches[0])) / MIB]
                contender.module.zero_grad()
            yield summarize("saved_mib", setting, saved, checked)
            if not peak:
                continue
            peaks: dict[str, list[float]] = {name: [] for name in contenders if not name.endswith("_compiled")}
            for _ in tqdm(range(options.repeats), desc=f"peak, {checkpointing}", unit="repeat", disable=None):
                for name in peaks:
                    if options.device.type == "cpu":
                        peaks[name].append(peak_of_process(name, options, setting))
                    else:
                        peaks[name].append(peak_mib(contenders[name], optimizers[name], options))
            yield summarize("peak_mib", setting, peaks, checked)


def peak_mib(contender: Contender, optimizer: torch.optim.Optimizer | None, options: Namespace) -> float:
    """Peak memory of some training steps over what is allocated before the first."""
    batches = random_tokens(options, 1, options.seq_len)
    memory = PeakMemory(options.device)
    before = torch.cuda.memory_allocated(options.device) if options.device.type == "cuda" else 0
    memory.start()
    for _ in range(PEAK_STEPS):
        train(contender, optimizer, batches)
    memory.stop()
    return (memory.peak_bytes - before) / MIB


def peak_of_process(name: str, options: Namespace, setting: Mapping[str, Any]) -> float:
    """`peak_mib` in a separate process: the resident set of this one contains all contenders and their past."""
    return in_process("memory", name, options, setting)


def in_process(suite: str, name: str, options: Namespace, setting: Mapping[str, Any]) -> Any:
    """What a suite's worker measures for one contender in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        values = {key: getattr(options, key) for key in ("model", "layers", "vocab", "seed", "threads", "device")}
        values |= {key: value for key, value in setting.items() if value is not None}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in values.items() if value is not None]
        script = Path(__file__).parents[1] / "benchmark.py"
        # of transformers about PEFT
        python = [sys.executable, "-W", "ignore::FutureWarning"]
        command = [*python, str(script), suite, *arguments, f"--worker={name}", f"--json={path}"]
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if status != 0:
            raise RuntimeError(f"{name}: the benchmark's process ended with status {status}; its message stands above.")
        return json.loads(path.read_text(encoding="utf-8"))


def measure_worker(options: Namespace) -> float:
    """The other side of `peak_of_process`."""
    base = build_model(options, options.dtype)
    contender = build_contender(
        options.worker,
        base,
        rank=options.rank[0],
        dropout=options.dropout[0],
        adapter_dtype=DTYPES[options.adapter_dtype],
        seed=options.seed,
    )
    return peak_mib(contender, prepare_training(contender, options.checkpointing[0]), options)
