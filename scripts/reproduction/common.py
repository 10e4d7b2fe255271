"""What the claims of `scripts/reproduce.py` share: a result file that a killed run goes on from, and where it lies."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import replacing
from common.machine import describe_machine
from common.plots import COLORS, save_figure

RESULTS = Path(__file__).parents[1] / "reproduce" / "results"


@dataclass(frozen=True)
class Options:
    """The command line of `scripts/reproduce.py`.

    Attributes:
        size: "laptop", under 20 minutes on 2 CPU cores, or "full", the paper's size on a GPU.
        results: Folder of the result files and figures.
        data: Folder of the models and data that `scripts/prepare_*.py` write.
        force: Whether to measure again what an earlier call, or another claim, has measured.
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

    def path(self, claim: str) -> Path:
        """The result file of a claim."""
        return self.results / f"{claim}_{self.size}{'_dry' if self.dry_run else ''}.json"


@dataclass(frozen=True)
class Plan:
    """What is trained, how long, and how often. The fields from `steps` on decide on the result of a run."""

    tasks: tuple[str, ...] = ("cities",)
    ranks: tuple[int, ...] = (2,)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_rates: int = 1
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
            runs.do(key, train)                      # a dictionary; at once if the file has it
        runs.finish(summary)

    The file holds `claim`, `size`, `command`, `settings`, `machines`, `runs` by their keys, each with its `seconds` and
    the place of its `machine` in that list, and once all is there `summary` and the `seeds` that it is of; runs of an
    earlier, larger command may stand in the file as well. A dry run has another file.

    Args:
        settings: What every run depends on. A file with other settings is kept beside, as `CLAIM_SIZE.json.bak`,
            `.bak1` and so on.
    """

    def __init__(self, claim: str, options: Options, settings: dict[str, Any]) -> None:
        self.path, self.options = options.path(claim), options
        # as the file gives it back
        settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {"claim": claim, "size": options.size, "command": options.command}
        self.content |= {"settings": settings, "machines": [], "runs": {}}
        # the keys that this command asked for
        self.asked: set[str] = set()
        # and has not asked for yet
        self.adopted: set[str] = set()
        if self.path.is_file() and not self.take(self.path):
            backups = (self.path.with_name(f"{self.path.name}.bak{number or ''}") for number in itertools.count())
            backup = next(path for path in backups if not path.exists())
            self.path.replace(backup)
            print(f"{self.path}: other settings or --force; what it held is in {backup.name} now")
        self.device = options.device

    def take(self, path: Path) -> bool:
        """Take over the runs of a file, and of this claim's own the summary; False if they do not fit."""
        other = json.loads(path.read_text(encoding="utf-8"))
        if other["settings"] != self.content["settings"] or self.options.force:
            return False
        if path == self.path and "summary" in other:
            self.content |= {name: other[name] for name in ("command", "seeds", "summary") if name in other}
        places = [self.place(machine) for machine in other["machines"]]
        for key, run in other["runs"].items():
            self.runs.setdefault(key, run | {"machine": places[run["machine"]]})
        for number, machine in enumerate(other["machines"]):
            count = sum(run["machine"] == number for run in other["runs"].values())
            where = f"{machine['processor']} at commit {(machine['commit'] or 'unknown')[:9]}"
            print(f"{path}: {count} runs, made on {where}; --force makes them again")
        return True

    def adopt(self, claim: str) -> None:
        """Use the runs of another claim that were made with the same settings."""
        path, own = self.options.path(claim), set(self.runs)
        if path.is_file() and self.take(path):
            self.adopted = set(self.runs) - own

    def place(self, machine: dict[str, Any]) -> int:
        """Where a machine stands in the list, at its end if it is new."""
        machines: list[dict[str, Any]] = self.content["machines"]
        if machine not in machines:
            machines.append(machine)
        return machines.index(machine)

    @property
    def runs(self) -> dict[str, Any]:
        return self.content["runs"]

    def do(
        self, key: str, run: Callable[[], dict[str, Any]], total: int | None = None, inputs: str = ""
    ) -> dict[str, Any]:
        """The result of `run` under `key`, from the file if it has one.

        Args:
            total: The number of runs, to print how far it is.
            inputs: The `digest` of what the run reads.

        Raises:
            ValueError: the file's run has read something else.
        """
        self.asked.add(key)
        self.adopted.discard(key)
        if key in self.runs and (found := self.runs[key].get("inputs", "")) != inputs:
            raise ValueError(
                f"{self.path}: expected runs of the model and data with digest {inputs}, found `{key}` of {found}. "
                "--force makes them again, --results FOLDER in another file."
            )
        if key not in self.runs:
            start = time.perf_counter()
            result = run()
            result |= {"inputs": inputs} if inputs else {}
            seconds = round(time.perf_counter() - start, 1)
            self.runs[key] = result | {"seconds": seconds, "machine": self.place(describe_machine(self.device))}
            self.write()
            place = "" if total is None else f"[{len(self.asked)}/{total}] "
            print(f"{place}{key}: {describe(self.runs[key])}", flush=True)
        return self.runs[key]

    def finish(self, summary: dict[str, Any]) -> None:
        """Store what the runs say together, unless that is a part of what an earlier command has stored.

        So a small grid, asked for after a large one, leaves the large one's summary in its place.
        """
        for key in self.adopted:
            del self.runs[key]
        places = sorted({run["machine"] for run in self.runs.values()})
        self.content["machines"] = [self.content["machines"][place] for place in places]
        for run in self.runs.values():
            run["machine"] = places.index(run["machine"])
        found = {
            "command": self.options.command,
            "seeds": sorted({self.runs[key]["seed"] for key in self.asked if "seed" in self.runs[key]}),
            "summary": summary,
        }
        if scope(found) < scope(self.content):
            print(f"{self.path}: keeps the larger grid of `{self.content['command']}`; --force replaces it")
        else:
            self.content |= found
        self.write()
        print(f"wrote {self.path}")

    def write(self) -> None:
        """The file, each run on one line: a run of `pattern` has thousands of numbers."""
        rest = {key: value for key, value in self.content.items() if key != "runs"}
        runs = ",\n".join(f"    {json.dumps(key)}: {json.dumps(run)}" for key, run in self.runs.items())
        text = f'{json.dumps(rest, indent=2)[:-2]},\n  "runs": {{\n{runs}\n  }}\n}}\n'
        with replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def scope(content: Mapping[str, Any]) -> set[tuple[str, Any]]:
    """What a summary is of: each case with each of its seeds and learning rates."""
    summary = content.get("summary", {})
    cases = summary.get("cases", summary.get("methods", {}))
    return {
        (name, value)
        for name, case in cases.items()
        for value in (*content.get("seeds", ()), *case.get("validation_loss_by_rate", ()))
    }


def describe(result: dict[str, Any]) -> str:
    """The numbers of a result in one line."""
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    return "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def lowest(losses: Mapping[float, float]) -> list[float]:
    """The learning rates by their validation losses, the lowest first; a run that diverged has no loss, and is last."""
    return sorted(losses, key=lambda rate: math.inf if math.isnan(losses[rate]) else losses[rate])


def at_edge(rate: float, rates: Collection[float]) -> bool:
    """Whether the best rate may lie beyond the grid of those that were tried; one alone is no grid."""
    return len(rates) > 1 and rate in (min(rates), max(rates))


def difference(
    summary: Mapping[str, Mapping[str, Any]], task: str, methods: tuple[str, str] = ("dora", "lora")
) -> dict[str, float]:
    """The first method's accuracy minus the second's, averaged over ranks and paired by seed: mean and 95 % interval.

    Runs of one seed see the same records in the same order at every rank, so that a seed counts once.
    """
    one, other = (
        {case["rank"]: case["accuracies"] for case in summary.values() if (case["task"], case["method"]) == (task, m)}
        for m in methods
    )
    gains = [[a - b for a, b in zip(one[rank], other[rank], strict=True)] for rank in one]
    return interval([statistics.mean(of_seed) for of_seed in zip(*gains, strict=True)])


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval, by Student's t, of what was found with several seeds.

    Of three values a bootstrap would give little more than their range, which holds the mean three times in four. One
    value has no interval: its ends are the value.
    """
    from scipy import stats

    mean, count = statistics.mean(values), len(values)
    width = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    return {"mean": mean, "low": mean - float(width), "high": mean + float(width), "count": count}


def draw_ranks(runs: Runs, title: str) -> None:
    """Accuracy by rank, one panel a task: means, every seed as a point, full fine-tuning as a band.

    The axes show the range of the methods, so that they can be told apart, and do not begin at 0.
    """
    from matplotlib.figure import Figure

    summary = runs.content["summary"]
    tasks = list(summary["gains"])
    figure = Figure(figsize=(4.8 * len(tasks), 4.4), layout="constrained")
    figure.suptitle(title)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        cases = [case for case in summary["cases"].values() if case["task"] == task]
        # a little apart, so that both are seen
        for method, aside in (("lora", 0.97), ("dora", 1.03)):
            of_method = sorted((c for c in cases if c["method"] == method), key=lambda case: case["rank"])
            places = [aside * case["rank"] for case in of_method]
            name, colour = {"lora": "LoRA", "dora": "DoRA"}[method], COLORS[method]
            axes.plot(places, [100 * c["mean"] for c in of_method], "o-", color=colour, label=name)
            for place, case in zip(places, of_method, strict=True):
                points = [100 * accuracy for accuracy in case["accuracies"]]
                axes.plot([place] * len(points), points, ".", color=colour, alpha=0.5)
        for case in cases:
            if case["method"] == "full":
                axes.axhline(100 * case["mean"], color=COLORS["full"], label="full fine-tuning")
                low, high = (100 * (case["mean"] + sign * case["spread"]) for sign in (-1, 1))
                axes.axhspan(low, high, color=COLORS["full"], alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = sorted({case["rank"] for case in cases if case["rank"]})
        axes.set_xticks(ticks, [str(rank) for rank in ticks])
        before = f" ({100 * summary['base'][task]:.1f} % before training)" if task in summary["base"] else ""
        axes.set(title=f"{task}{before}", xlabel="rank", ylabel="test answers right, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path = runs.path.with_suffix(".png")
    save_figure(figure, path)
    print(f"wrote {path}")


def draw_detach(runs: Runs, model: str) -> None:
    """Accuracies of the two, and memory of the two on the dense algorithm and on ours."""
    from matplotlib.figure import Figure

    summary = runs.content["summary"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(f"{model}: the norm detached or not; memory at {summary['memory_of']}")
    left, right = figure.subplots(1, 2)
    for place, case in enumerate(summary["cases"].values()):
        left.bar(place, 100 * case["mean"], 0.6, color=COLORS["dora"], alpha=1.0 if case["method"] == "dora" else 0.5)
        left.plot([place] * len(case["accuracies"]), [100 * a for a in case["accuracies"]], "k.")
    labels = [f"{c['task']},\n{'' if c['method'] == 'dora' else 'not '}detached" for c in summary["cases"].values()]
    left.set_xticks(range(len(labels)), labels)
    left.set(title="accuracy, every seed as a point", ylabel="test answers right, %")
    names = {
        "reference": "dense,\ndetached", "reference_not_detached": "dense,\nnot\ndetached", "dora": "ours,\ndetached",
        "dora_not_detached": "ours,\nnot\ndetached",
    }  # fmt: skip
    # the reference computes as PEFT's DoRA does
    for name, label in names.items():
        colour = COLORS["peft_dora" if name.startswith("reference") else "dora"]
        alpha = 0.5 if name.endswith("not_detached") else 1.0
        right.bar_label(right.bar(label, summary["total_mib"][name], 0.6, color=colour, alpha=alpha), fmt="%.0f")
    right.set(title="memory of training", ylabel="MiB")
    right.margins(y=0.12)
    path = runs.path.with_suffix(".png")
    save_figure(figure, path)
    print(f"wrote {path}")
