"""What the claims of `scripts/reproduce.py` share: a result file that a killed run goes on from, and where it lies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark_common import describe_machine, replacing, write_json

RESULTS = Path(__file__).parent / "reproduce" / "results"


@dataclass(frozen=True)
class Options:
    """The command line of `scripts/reproduce.py`.

    Attributes:
        size: "laptop", under 20 minutes on 2 CPU cores, or "full", the paper's size on a GPU.
        results: Folder of the result files and figures.
        data: Folder of the models and data that `scripts/prepare_*.py` write.
        force: Whether to forget the results of an earlier run.
        dry_run: Whether to go through everything at toy size, in seconds; the figures mean nothing.
        command: The command itself, for the report.
    """

    size: str = "laptop"
    results: Path = RESULTS
    data: Path = Path("data")
    force: bool = False
    dry_run: bool = False
    command: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Plan:
    """What is trained, how long, and how often. The fields from `steps` on decide on the result of a run."""

    tasks: tuple[str, ...] = ("spelling",)
    ranks: tuple[int, ...] = (2, 8, 32)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_rates: int = 2
    steps: int = 30
    batch: int = 16
    num_train: int = 8000
    num_validation: int = 100
    num_test: int = 400

    @property
    def middle(self) -> int:
        return sorted(self.ranks)[len(self.ranks) // 2]

    def settings(self) -> dict[str, Any]:
        names = ("steps", "batch", "num_train", "num_validation", "num_test")
        return {name: getattr(self, name) for name in names} | {"model": "SmolLM2-135M-Instruct"}


class Runs:
    """The runs of one claim, in one JSON file that is rewritten, whole, after each of them.

        runs = Runs("accuracy", options, settings)
        for key, train in plan.items():
            runs.do(key, train)                      # a dictionary; at once where the file has it
        runs.finish(summary)

    The file holds `claim`, `size`, `command`, `settings`, `machine`, `runs` by their keys, and `summary`.

    Args:
        settings: What every run depends on. Runs of a file with other settings are forgotten.
    """

    def __init__(self, claim: str, options: Options, settings: dict[str, Any]) -> None:
        self.path = options.results / f"{claim}_{options.size}.json"
        settings = json.loads(json.dumps(settings | {"dry_run": options.dry_run}))  # as the file gives it back
        self.content: dict[str, Any] = {"claim": claim, "size": options.size, "command": options.command}
        self.content |= {"settings": settings, "runs": {}}
        if self.path.is_file() and not options.force:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                self.content["runs"] = stored["runs"]
        self.device = options.device

    def adopt(self, claim: str) -> None:
        """Take over the runs of another claim that were made with the same settings."""
        path = self.path.with_name(f"{claim}_{self.content['size']}.json")
        if path.is_file():
            other = json.loads(path.read_text(encoding="utf-8"))
            if other["settings"] == self.content["settings"]:
                self.content["runs"] = other["runs"] | self.runs

    @property
    def runs(self) -> dict[str, Any]:
        return self.content["runs"]

    def do(self, key: str, run: Callable[[], dict[str, Any]], total: int | None = None) -> dict[str, Any]:
        """The result of `run` under `key`, from the file where it has one."""
        if key not in self.runs:
            start = time.perf_counter()
            result = run()
            self.runs[key] = result | {"seconds": round(time.perf_counter() - start, 1)}
            self.content["machine"] = describe_machine(self.device)
            write_json(self.path, self.content)
            place = "" if total is None else f"[{len(self.runs)}/{total}] "
            print(f"{place}{key}: {describe(self.runs[key])}", flush=True)
        return self.runs[key]

    def finish(self, summary: dict[str, Any]) -> None:
        """Store what the runs say together."""
        self.content["summary"] = summary
        self.content.setdefault("machine", describe_machine(self.device))
        write_json(self.path, self.content)
        print(f"wrote {self.path}")


def describe(result: dict[str, Any]) -> str:
    """The numbers of a result in one line."""
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    return "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def gain_of(summary: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, float]:
    """DoRA's accuracy minus LoRA's, the mean over ranks and seeds with its 95 % interval by resampling the pairs."""
    found = {
        m: {c["rank"]: c["accuracies"] for c in summary.values() if (c["task"], c["method"]) == (task, m)}
        for m in ("lora", "dora")
    }
    pairs = [b - a for rank, ours in found["dora"].items() for a, b in zip(found["lora"][rank], ours, strict=True)]
    return interval(pairs)


def interval(values: Sequence[float], draws: int = 10000) -> dict[str, float]:
    """Mean, and the 2.5 % and 97.5 % quantiles of the means of samples drawn with replacement."""
    numbers = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = numbers[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": numbers.mean().item(), "low": low, "high": high, "count": len(values)}


def draw_ranks(runs: Runs, title: str) -> None:
    """Accuracy by rank, one panel a task: means, every seed as a point, full fine-tuning as a band."""
    from matplotlib.figure import Figure

    summary = runs.content["summary"]
    tasks = list(summary["gains"])
    figure = Figure(figsize=(6.5 * len(tasks), 4.6), layout="constrained")
    figure.suptitle(title)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        cases = [case for case in summary["cases"].values() if case["task"] == task]
        for method, colour in (("lora", "tab:blue"), ("dora", "tab:orange")):
            of_method = sorted((c for c in cases if c["method"] == method), key=lambda case: case["rank"])
            ranks = [case["rank"] for case in of_method]
            name = {"lora": "LoRA", "dora": "DoRA"}[method]
            rate = f", lr {of_method[0]['rate']:g}" if "rate" in of_method[0] else ""
            axes.plot(ranks, [100 * c["mean"] for c in of_method], "o-", color=colour, label=name + rate)
            for case in of_method:
                points = [100 * accuracy for accuracy in case["accuracies"]]
                axes.plot([case["rank"]] * len(points), points, ".", color=colour, alpha=0.5)
        for case in cases:
            if case["method"] == "full":
                axes.axhline(100 * case["mean"], color="tab:green", label=f"full fine-tuning, lr {case['rate']:g}")
                low, high = (100 * (case["mean"] + sign * case["spread"]) for sign in (-1, 1))
                axes.axhspan(low, high, color="tab:green", alpha=0.12, linewidth=0)
        if task in summary["base"]:
            axes.axhline(100 * summary["base"][task], color="grey", linestyle=":", label="before training")
        axes.set_xscale("log", base=2)
        ticks = sorted({case["rank"] for case in cases if case["rank"]})
        axes.set_xticks(ticks, [str(rank) for rank in ticks])
        axes.set(title=task, xlabel="rank", ylabel="test answers right, %")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path = runs.path.with_suffix(".png")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    print(f"wrote {path}")
