"""What a training step with this package costs beside PEFT's LoRA, whichever library multiplies.

    python scripts/benchmark_price.py                               # all settings; more than an hour on 2 cores
    python scripts/benchmark_price.py --resume                      # those that this commit has not measured yet
    python scripts/benchmark_price.py --settings llama-512,short    # these alone; the others' results stay

On a laptop without GPU, in seconds:

    python scripts/benchmark_price.py --settings toy --processes 1 --rounds 1 --results /tmp

Each setting is measured by several processes, one after the other, and each of them runs all contenders in turn, in an
order shuffled every round, under every library: `default` is what a user gets (ours multiplies by oneDNN where
ops/products.py says so, LoRA by torch's F.linear), `torch` has both multiply by F.linear, with oneDNN off, and `same`
has both multiply by what ops/products.py chooses; see benchmarks/libraries.py. Losses, logits and gradients are
compared with those of PEFT's DoRA before anything is timed. Ten of the settings are drawn by a seed, so that they are
shapes that nobody has chosen; one compares compiled models with compiled ones and with eager ones.

Expected result: a table, in markdown, of ours / LoRA under each library, the median and the range over the processes of
each one's median ratio; and the medians of every process with versions, instruction sets and commit as
scripts/benchmarks/results/price_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.libraries import LIBRARIES
from benchmarks.price import ALL, SEED, SETTINGS, listed, measure_setting
from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=listed, default=ALL, help=f"some of {','.join(SETTINGS)} (all but toy)")
    parser.add_argument("--processes", type=positive, default=5, help="for each setting (5)")
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds of a process (15)")
    parser.add_argument("--warmup", type=positive, default=3, help="rounds before them (3)")
    parser.add_argument("--threads", type=positive, help="of torch (torch's choice)")
    parser.add_argument("--resume", action="store_true", help="keep what this commit has measured with these options")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--worker", type=int, metavar="NUMBER", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measured_by(options: argparse.Namespace, name: str, number: int) -> dict[str, Any]:
    """What a process of its own finds of a setting.

    Raises:
        RuntimeError: The process ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        words = [f"--settings={name}", f"--rounds={options.rounds}", f"--warmup={options.warmup}"]
        words += [f"--worker={number}", f"--json={path}"]
        words += [] if options.threads is None else [f"--threads={options.threads}"]
        # of transformers about PEFT
        python = [sys.executable, "-W", "ignore::FutureWarning"]
        status = subprocess.run([*python, __file__, *words], stdout=subprocess.DEVNULL).returncode
        if status != 0:
            raise RuntimeError(f"{name}: process {number} ended with status {status}; its message stands above.")
        return json.loads(path.read_text(encoding="utf-8"))


def summarize(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By library and price: median, least and most of the processes' ratios."""
    prices: dict[str, dict[str, dict[str, Any]]] = {}
    for choice, first in found[0].items():
        for price in first["ratio"]:
            ratios = [process[choice]["ratio"][price] for process in found]
            entry = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            prices.setdefault(choice, {})[price] = entry
    return prices


def is_stored(entry: Mapping[str, Any] | None, wanted: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
    """Whether this commit, with no change beside it, has measured the setting with these options on this machine."""
    if entry is None or machine["commit"] is None or machine["modified"]:
        return False
    return entry["machine"] == machine and all(entry[name] == value for name, value in wanted.items())


def format_table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each setting and price, a column for each library."""
    lines = [f"| setting | tokens, width, rank, dropout | price | {' | '.join(LIBRARIES)} |", "|---" * 6 + "|"]
    for name, entry in settings.items():
        one = entry["setting"]
        tokens = f"{one['batch']} x {one['seq_len']}, {one['shape']['hidden']}, {one['rank']}, {one['dropout']}"
        for price in next(iter(entry["prices"].values())):
            cells = []
            for choice in LIBRARIES:
                found = entry["prices"].get(choice, {}).get(price)
                cells.append(f"{found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f})" if found else "-")
            lines.append(f"| {name} | {tokens} | {price} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.worker is not None:
        write_json(options.json, measure_setting(options.settings[0], options.rounds, options.warmup, options.worker))
        return
    machine, path = json.loads(json.dumps(describe_machine(torch.device("cpu")))), options.results / "price_cpu.json"
    settings: dict[str, Any] = {}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    for name in options.settings:
        wanted = {
            "setting": json.loads(json.dumps(SETTINGS[name].describe())),
            "processes": options.processes,
            "rounds": options.rounds,
            "warmup": options.warmup,
        }
        if options.resume and is_stored(settings.get(name), wanted, machine):
            print(f"{name}: stored by this commit, not repeated", flush=True)
            continue
        numbers = tqdm(range(options.processes), desc=name, unit="process", disable=None)
        found = [measured_by(options, name, number) for number in numbers]
        settings[name] = {**wanted, "prices": summarize(found), "found": found, "machine": machine}
        # whole settings are kept if the next one is ended
        ordered = {one: settings[one] for one in SETTINGS if one in settings}
        write_json(path, {"seed": SEED, "settings": ordered})
        print(format_table({name: settings[name]}).splitlines()[-1], flush=True)
    print("\n" + format_table({name: settings[name] for name in options.settings}))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    sets = machine["instruction_sets"]
    print(f"\n{machine['processor']} ({sets['torch']}; {' '.join(sets['processor'])}), threads {machine['threads']}")
    print(f"{versions}; {options.processes} processes x {options.rounds} rounds; wrote {path}", flush=True)


if __name__ == "__main__":
    main()
