"""Speed and memory of DoRA against PEFT's LoRA and `use_dora`, and against what no adapter could beat.

    python scripts/benchmark.py SUITE [--model llama-512] [--rank 16,128] [--dropout 0,0.05] [options]
    python scripts/benchmark.py all     # every run behind results/cpu.md; 20 to 25 minutes on 2 cores, resumable

On a laptop without GPU, in seconds:

    python scripts/benchmark.py step --model tiny

Suites: `step` (whole training step), `layer` (forward, backward and both of one linear layer), `eval`, `decode`
(single tokens behind a KV cache), `refresh` (the norm alone, its error, how often it is computed), `memory` (bytes
kept for backward; peak of the allocator on a GPU, of the resident set in a process per contender on a CPU), `idle`
(training step with 40 adapters beside the active one), `resident` (what creating, loading and merging an adapter add
to the resident memory of a process on a CPU).

Contenders: `lora`, `peft_dora` (LoraConfig(use_dora=True)), `dora` and `dora:IMPLEMENTATION` (this package), `frozen`
(the base model alone, dx included), `lora_floor` (base and low-rank products, nothing else), in inference also
`peft_dora_cached` (under peft.helpers.DoraCaching), and with --compile `lora_compiled` and `dora_compiled`.

All contenders share one random base model of the true widths and have equal adapters. Without dropout, their losses,
outputs and gradients are compared before anything is timed; an unequal one ends the run with its name. Then they run
in turn, in an order shuffled every round. With dropout, PEFT's DoRA drops its base product too, ours only the branch.

Expected result: a table of medians, [quartiles] and ratios to `lora` within each round; the same with raw values,
device and versions as scripts/benchmarks/results/SUITE_MODEL_DEVICE[_TAG].json; and bars of the ratios beside it.
`python scripts/update_readme.py` writes the README's table from these files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import SHAPES
from benchmarks.footprint import measure_worker
from benchmarks.options import (
    read_options,
    result_path,
    stored_options,
)
from benchmarks.partial import Partial
from benchmarks.report import draw_ratios, format_result
from benchmarks.resident import measure_resident
from benchmarks.suites import SUITES
from common.files import write_json
from common.machine import describe_machine

MAIN = "--contenders dora,frozen,lora_floor"
# The runs of `all`: enough layers for a step to be made of what a deep model's is made of, few enough for 25 minutes.
PLAN = (
    f"step --model llama-512 --rank 16,128 --dropout 0,0.05 {MAIN},dora:reference",
    f"step --model smollm2-135m --layers 3 --rank 16,128 --dropout 0,0.05 {MAIN}",
    f"step --model llama-1024 --layers 2 --batch 2 --rank 16,128 --dropout 0,0.05 {MAIN}",
    f"step --model llama-3.2-1b --layers 1 --batch 1 --rank 16 --dropout 0,0.05 {MAIN}",
    f"step --model llama-512 --batch 1 --accumulation 4 --checkpointing none,non-reentrant --tag accumulation {MAIN}",
    f"eval --model llama-512 {MAIN},peft_dora_cached",
    f"eval --model llama-1024 --layers 2 --batch 2 {MAIN},peft_dora_cached",
    f"decode --model llama-512 {MAIN},peft_dora_cached",
    f"decode --model llama-1024 --layers 2 {MAIN},peft_dora_cached",
    f"memory --model llama-512 --batch 2 {MAIN}",
    "idle --model llama-512",
    "resident --model llama-3.2-1b --dtype bf16 --batch 1 --seq-len 64",
    "refresh --model llama-1024 --layers 2",
    "refresh --model llama-1024 --layers 2 --dtype bf16 --tag bf16",
)


def is_stored(path: Path, options: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
    """Whether `path` holds a run of these options by this commit, with no change to the package beside it."""
    if not path.exists():
        return False
    report = json.loads(path.read_text(encoding="utf-8"))
    known = machine["commit"] is not None and not machine["modified"] and not report["modified"]
    return known and (report["options"], report["commit"]) == (options, machine["commit"])


def run(options: argparse.Namespace) -> None:
    """Run one suite, print its tables, write its JSON and its plot."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path, machine, stored = result_path(options), describe_machine(options.device), stored_options(options)
    if options.resume and is_stored(path, stored, machine):
        print(f"{path} is there already; --force repeats it")
        return
    if options.shapes is None:
        options.shapes = SHAPES[options.model].linears()
    partial = Partial(path, stored, machine, options.resume)
    options.known = partial.results
    report: dict[str, Any] = {**machine, "options": stored, "skipped": partial.skipped, "results": []}
    for result in SUITES[options.suite](options, report["skipped"]):
        report["results"].append(result)
        partial.add(result)
        print(f"\n{options.suite}, {options.model}: {format_result(result)}", flush=True)
    write_json(path, report)
    partial.end()
    try:
        draw_ratios(report, path.with_suffix(".png"))
    # the figures are stored; a bare machine may have no matplotlib
    except ModuleNotFoundError as error:
        print(f"note: no bars are drawn: {error}", flush=True)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    state = f"{machine['commit'] or 'unknown'}{', modified' if machine['modified'] else ''}"
    print(f"\n{machine['device']} ({machine['processor']}), threads {machine['threads']}; {versions}; commit {state}")
    print(f"medians of {options.rounds} interleaved rounds; wrote {path}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = read_options(argv, __doc__)
    if options.suite == "all":
        rest = [word for word in argv if word not in ("all", "--force")]
        for number, planned in enumerate(PLAN, 1):
            print(f"\n[{number}/{len(PLAN)}] {planned}", flush=True)
            # Options given beside `all` come last and so win over the plan's.
            run(read_options([*planned.split(), *rest, *([] if options.force else ["--resume"])]))
    elif options.worker is not None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        measured = measure_resident(options) if options.suite == "resident" else measure_worker(options)
        write_json(options.json, measured)
    else:
        run(options)


if __name__ == "__main__":
    main()
