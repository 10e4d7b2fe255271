"""Where the time of a training step goes, ours beside PEFT's LoRA, by kinds of operations.

    python scripts/profile_step.py                                 # llama-512, with oneDNN off; half a minute
    python scripts/profile_step.py --settings short,tiny-batch     # others of scripts/benchmark_price.py
    python scripts/profile_step.py --settings toy --steps 1 --results /tmp

torch's profiler counts the time of each operation without those that it calls; what passes between them, in Python and
in the autograd engine, is the rest of the step. The profiler itself makes many small operations slower.

Expected result: a table for each setting, in ms a step, and the same as
scripts/benchmarks/results/profile_cpu.json, from which `python scripts/update_readme.py` writes price.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bases import DTYPES, build_base
from benchmarks.contenders import Contender
from benchmarks.libraries import LIBRARIES, library
from benchmarks.measure import prepare_training, random_tokens, train
from benchmarks.price import CPU, SETTINGS, VOCABULARY, build_models, listed
from benchmarks.price_page import profile_table
from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine

# The first that is found in an operation's name counts.
KINDS = {
    "products": r"::(mm|addmm|bmm|baddbmm|addmm_|_linear_pointwise)$",
    "attention": r"scaled_dot_product|flash",
    "copies": r"::(copy_|clone|cat|fill_|zero_|_to_copy|contiguous)$",
    "the layer's own Python": r"^_Linear",
    "optimizer": r"^Optimizer",
    "other operations": r"::",
}
REST = "between operations"


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=listed, default=["llama-512"], help=f"some of {','.join(SETTINGS)}")
    parser.add_argument("--library", choices=LIBRARIES, default="torch", help="which multiplies (torch: oneDNN off)")
    parser.add_argument("--steps", type=positive, default=10, help="profiled steps (10)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    return parser.parse_args(argv)


def kind_of(name: str) -> str:
    """The kind of an operation, `REST` for what is none."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def profiled(contender: Contender, tokens: torch.Tensor, steps: int) -> dict[str, float]:
    """ms a step by kind; those of `REST` are what is left of the time."""
    optimizer = prepare_training(contender, "none")
    for _ in range(3):
        train(contender, optimizer, [tokens])
    found = dict.fromkeys([*KINDS, REST], 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            train(contender, optimizer, [tokens])
        taken = 1000 * (time.perf_counter() - start)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1000
    found[REST] = taken - sum(ms for kind, ms in found.items() if kind != REST)
    return {kind: ms / steps for kind, ms in found.items()}


def profile_setting(name: str, choice: str, steps: int) -> dict[str, dict[str, float]]:
    """ms a step by contender and kind."""
    setting = SETTINGS[name]
    options = Namespace(batch=setting.batch, vocab=min(setting.shape.vocab, VOCABULARY), seed=0, device=CPU)
    base = build_base(setting.shape, setting.layers, options.vocab, DTYPES["fp32"], CPU, 0)
    (tokens,) = random_tokens(options, 1, setting.seq_len)
    with library(choice):
        models = build_models(setting, base, 0)
        return {one: profiled(models[one], tokens, steps) for one in ("lora", "dora")}


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    path = options.results / "profile_cpu.json"
    profiles: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["profiles"] if path.is_file() else {}
    for name in options.settings:
        found = profile_setting(name, options.library, options.steps)
        profiles[name] = {
            "library": options.library,
            "steps": options.steps,
            "ms": found,
            "machine": describe_machine(CPU),
        }
        print(profile_table(name, profiles[name]) + "\n", flush=True)
    write_json(path, {"profiles": profiles})


if __name__ == "__main__":
    main()
