"""Reproduce the claims of the DoRA paper (arXiv 2402.09353), each by one command.

    python scripts/reproduce.py memory   --size laptop    # what detaching the norm saves, on LLaMA and VL-BART
    python scripts/reproduce.py vl_bart  --size laptop    # VL-BART answers questions about pictures
    python scripts/reproduce.py pattern  --size laptop    # how magnitude and direction change together
    python scripts/reproduce.py accuracy --size laptop    # LoRA, DoRA and full fine-tuning, by rank
    python scripts/reproduce.py detach   --size laptop    # accuracy and memory with and without detaching
    python scripts/reproduce.py report                    # REPRODUCTION.md from all results

`--size laptop` takes under 20 minutes each on 2 idle CPU cores; `--size full` is the paper's size, on a GPU of 80 GB
(for pattern, longer training of SmolLM2). Every claim writes `CLAIM_SIZE.json` and figures to
`scripts/reproduce/results/`, where the results that the repository holds lie as well: a command goes on from them, and
`--force` measures again, in another file with `--results FOLDER`. A run that was killed goes on where it was,
without `--force`.

By default accuracy and detach train one task at rank 2 with one learning rate. What is stored there is a larger grid,
whose rates were chosen for each method and rank, of eleven hours of one core, and one of the cost of detaching. More
seeds narrow the intervals, and go on from the runs that are there:

    python scripts/reproduce.py accuracy --tasks spelling cities --ranks 2 4 8 16 32 --num_rates 5
    python scripts/reproduce.py detach   --tasks spelling cities --ranks 8 --num_rates 5
    python scripts/reproduce.py accuracy --tasks spelling cities --ranks 2 4 8 16 32 --num_rates 5 --seeds 0 1 2 3 4

Prerequisites: `pip install -e .[scripts]`, and for accuracy, detach and pattern at laptop size
`python scripts/prepare_smollm2.py && python scripts/prepare_cmudict.py && python scripts/prepare_cities.py`, for
vl_bart `python scripts/prepare_easy_vqa.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.arguments import positive
from reproduction.common import RESULTS, Options

CLAIMS = ("memory", "vl_bart", "pattern", "accuracy", "detach", "report")
GRID = {"tasks": str, "ranks": positive, "seeds": int}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--size", choices=("laptop", "full"), default="laptop", help="default laptop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: in the repository)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of models and data (default data)")
    parser.add_argument("--force", action="store_true", help="measure again what the files of results have")
    parser.add_argument("--dry_run", action="store_true", help="everything at toy size; the figures mean nothing")
    parser.add_argument("--config", type=Path, help="vl_bart: its settings (default: of configs/vl_bart_*.yaml)")
    parser.add_argument("--model", help="vl_bart: a pretrained BART, folder or Hub id such as facebook/bart-base")
    grid = parser.add_argument_group("accuracy and detach: a larger or smaller grid, which reuses the runs of others")
    for name, kind in GRID.items():
        grid.add_argument(f"--{name}", nargs="+", type=kind, help="also of vl_bart" if name == "seeds" else None)
    grid.add_argument("--num_rates", type=positive, help="learning rates per method")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = vars(parser.parse_args(argv))
    claim, config, model = (args.pop(name) for name in ("claim", "config", "model"))
    grid: dict[str, Any] = {name: args.pop(name) for name in (*GRID, "num_rates")}
    # a value that is given twice would count as two
    grid = {name: tuple(dict.fromkeys(v)) if isinstance(v, list) else v for name, v in grid.items() if v}
    options = Options(**args, command=f"python scripts/reproduce.py {shlex.join(argv)}")
    fitting = {"accuracy": {*grid}, "detach": {*grid}, "vl_bart": {"seeds"}}.get(claim, set())
    if unfitting := sorted(set(grid) - fitting):
        others = ", detach and vl_bart" if unfitting == ["seeds"] else " and detach"
        parser.error(f"--{unfitting[0]} is for accuracy{others}, not for {claim}")
    for name, value in (("config", config), ("model", model)):
        if value is not None and claim != "vl_bart":
            parser.error(f"--{name} is for vl_bart, not for {claim}")
    if args["size"] == "full" and not args["dry_run"] and claim != "report" and options.device.type == "cpu":
        parser.error("--size full needs a GPU of 80 GB, and found none; --size laptop is for CPUs")
    if args["size"] == "full" and not args["dry_run"] and (ignored := {"tasks", "num_rates"} & set(grid)):
        parser.error(f"--{sorted(ignored)[0]} is for the laptop size; the full one trains as the paper did")
    # PEFT up to 0.21.2 reads a name that transformers 5.23 has renamed, once in each of many runs.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    module = importlib.import_module("reproduction.accuracy" if claim == "detach" else f"reproduction.{claim}")
    try:
        if claim in ("accuracy", "detach"):
            plan = dataclasses.replace(module.plan_of(options), **grid)
            module.run(options, plan) if claim == "accuracy" else module.run_detach(options, plan)
        elif claim == "vl_bart":
            module.run(options, config, grid.get("seeds"), model)
        else:
            module.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        # OSError: such as a model that the Hub does not give
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            # torch's own, such as a lack of memory, need their traceback
            raise
        parser.error(str(error))


if __name__ == "__main__":
    main()
