"""How magnitude and direction change together, in full fine-tuning, LoRA and DoRA (sec. 3.2 of the paper).

Called by `scripts/reproduce.py pattern`. Each method trains SmolLM2-135M on the spelling task with several seeds, while
`dora_peft.analysis.DecompositionCallback` records dM and dD of every linear layer at equal intervals. The paper finds a
correlation of -0.62 in full fine-tuning, +0.83 in LoRA and -0.31 in DoRA, over layers and checkpoints of the query
projections of VL-BART; here it is computed for the query projections and for all linear layers of SmolLM2-135M, at full
size after longer training. The intervals resample modules, whose points at several checkpoints and seeds belong
together. All changes grow with the steps, which pushes the correlation over checkpoints up; so it is also given for the
last checkpoint alone, and drawn for each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from common.files import replacing
from dora_peft.analysis import (
    DecompositionCallback,
    correlate,
    correlate_by_step,
    draw_correlations,
    draw_pattern,
    draw_trajectories,
)
from reproduction.accuracy import Laboratory, Plan, Trial
from reproduction.common import Options, Runs

PAPER = {"full": -0.62, "lora": 0.83, "dora": -0.31}
TITLES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}
RATES = {"full": 2e-4, "lora": 2e-3, "dora": 2e-3}
RANK = 8


def plan_of(options: Options) -> tuple[Plan, int]:
    """What is trained, and the optimizer steps between two records."""
    if options.dry_run:
        sizes = {"steps": 4, "batch": 2, "num_train": 8, "num_validation": 4, "num_test": 4}
        return Plan(seeds=(0, 1), **sizes), 2
    if options.size == "full":
        return Plan(steps=1000, batch=32, num_train=50000), 200
    return Plan(steps=40, batch=8), 8


def run(options: Options) -> None:
    """Train with each method and seed, store every dM and dD, correlate and draw them."""
    plan, every = plan_of(options)
    laboratory = Laboratory(options, plan)
    settings = laboratory.settings() | {"every": every, "rank": RANK, "rates": RATES}
    runs = Runs("pattern", options, settings)
    total = len(TITLES) * len(plan.seeds)
    histories: dict[str, list[dict[str, Any]]] = {method: [] for method in TITLES}
    for method in TITLES:
        for seed in plan.seeds:
            trial = Trial("spelling", method, 0 if method == "full" else RANK, RATES[method], seed)
            inputs = laboratory.inputs(trial.task)
            found = runs.do(trial.key, lambda trial=trial: record(laboratory, trial, every), total, inputs)  # type: ignore[misc]
            histories[method] += found["history"]
    groups = {
        name: {method: select(history, ending) for method, history in histories.items()}
        for name, ending in (("query projections", "q_proj"), ("all linear layers", ""))
    }
    share = max(run["recording_seconds"] / run["training_seconds"] for run in runs.runs.values())
    runs.finish(summarise(groups) | {"paper": PAPER, "share_of_recording": share})
    titled = {name: {TITLES[m]: history for m, history in group.items()} for name, group in groups.items()}
    where = f"SmolLM2-135M, {plan.steps} steps, {len(plan.seeds)} seeds"
    for suffix, draw, shown, title in (
        ("", draw_pattern, titled["query projections"], f"Query projections of {where}"),
        ("_by_step", draw_correlations, titled, where),
        ("_trajectories", draw_trajectories, titled["all linear layers"], where),
    ):
        path = runs.path.with_name(f"{runs.path.stem}{suffix}.png")
        with replacing(path) as temporary:
            draw(shown, title, temporary)
        print(f"wrote {path}")
    for name, by_method in runs.content["summary"]["correlations"].items():
        for method, found in by_method.items():
            print(f"{name}, {TITLES[method]}: {describe(found)} (paper {PAPER[method]:+.2f})")


def summarise(groups: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """The correlations of each group of modules and method, over all checkpoints and at the last one alone."""
    return {
        "correlations": {
            name: {method: correlate(list(history))._asdict() for method, history in group.items()}
            for name, group in groups.items()
        },
        "at_the_last_step": {
            name: {m: list(correlate_by_step(list(h)).values())[-1]._asdict() for m, h in group.items()}
            for name, group in groups.items()
        },
    }


def record(laboratory: Laboratory, trial: Trial, every: int) -> dict[str, Any]:
    callback = DecompositionCallback(steps=every, reference=laboratory.base if trial.method == "full" else None)
    start = time.perf_counter()
    laboratory.train(trial, [callback])
    seconds = {"training_seconds": time.perf_counter() - start, "recording_seconds": callback.seconds}
    # six of them say all, and spare half of a large file
    digits = {"magnitude", "direction"}
    history = [{k: float(f"{v:.6g}") if k in digits else v for k, v in e.items()} for e in callback.history]
    return {"method": trial.method, "seed": trial.seed, "history": history} | seconds


def select(history: Sequence[Mapping[str, Any]], ending: str) -> list[dict[str, Any]]:
    return [dict(point) for point in history if point["module"].endswith(ending)]


def describe(found: Mapping[str, float]) -> str:
    return f"{found['r']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
