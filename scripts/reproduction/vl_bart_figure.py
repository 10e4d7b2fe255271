"""The accuracies of VL-BART as a figure and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.plots import COLORS, save_figure
from reproduction.common import Runs, interval

METHODS = {
    "lora": "LoRA", "dora": "DoRA", "dora_not_detached": "DoRA,\nnorm not\ndetached", "full": "full\nfine-tuning"
}  # fmt: skip
# images
PAPER = {"full": 77.3, "lora": 76.5, "dora": 77.4}


PAPER_OF_DATASET = {"vl_bart_image": PAPER, "vl_bart_video": {"full": 87.5, "lora": 83.5, "dora": 85.4}}


def difference(methods: Mapping[str, Mapping[str, Any]], one: str, other: str) -> dict[str, float]:
    """One method's accuracy minus another's, paired by seed: mean and 95 % interval."""
    return interval([a - b for a, b in zip(methods[one]["accuracies"], methods[other]["accuracies"], strict=True)])


def print_summary(summary: Mapping[str, Any]) -> None:
    for method, entry in summary["methods"].items():
        rate = f"{entry['rate']:g}{', at the edge of its grid,' if entry['edge'] else ''}"
        print(
            f"{method:<18} lr {rate} accuracy {entry['mean']:.1%} +- {entry['spread']:.1%}, with other pictures "
            f"{entry['swapped']:.1%}"
        )
    for name, gain in summary["differences"].items():
        low, high = 100 * gain["low"], 100 * gain["high"]
        print(f"{name}: {100 * gain['mean']:+.1f} points [{low:+.1f}, {high:+.1f}], {gain['count']} seeds")
    print(
        f"question alone {summary['question_only']:.1%}, before adaptation {summary['before']:.1%}, "
        f"{summary['num_test']} test questions, {summary['num_validation']} to choose the rate by"
    )


def draw(runs: Runs) -> None:
    """Accuracy of each method against guessing from the question, and the difference to LoRA; a point a seed."""
    from matplotlib.figure import Figure

    summary: Mapping[str, Any] = runs.content["summary"]
    methods, dataset = summary["methods"], runs.content["settings"]["dataset"]
    # elsewhere they would invite a comparison of unlike data
    paper = PAPER_OF_DATASET.get(dataset, {})
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (method, entry) in enumerate(methods.items()):
        # as DoRA, of which it is a variant
        colour = COLORS[method.removesuffix("_not_detached")]
        bar = left.bar(place, 100 * entry["mean"], 0.6, color=colour, alpha=0.6)
        label = f"{100 * entry['mean']:.1f}" + (f"\n(paper {paper[method]})" if method in paper else "")
        left.bar_label(bar, [label], padding=7, fontsize=10)
        left.plot([place] * len(entry["accuracies"]), [100 * a for a in entry["accuracies"]], "k.", markersize=5)
        cross = "another's picture" if place == 0 else None
        left.plot(place, 100 * entry["swapped"], "x", color="black", markersize=8, label=cross)
    left.axhline(100 * summary["question_only"], color="k", linestyle="--", linewidth=1, label="question alone")
    left.set(title="test questions answered rightly", ylabel="%", ylim=(0, 140 if paper else 124))
    left.set_yticks(range(0, 101, 20))

    others = [method for method in methods if method != "lora"]
    for place, method in enumerate(others):
        gain, colour = difference(methods, method, "lora"), COLORS[method.removesuffix("_not_detached")]
        pairs = zip(methods[method]["accuracies"], methods["lora"]["accuracies"], strict=True)
        mean, low, high = (100 * gain[name] for name in ("mean", "low", "high"))
        # rounding could make -1e-15 of 0
        errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        names = ("mean, 95 % interval", "a seed") if place == 0 else (None, None)
        right.errorbar(place, mean, errors, fmt="o", color=colour, capsize=6, linewidth=2, label=names[0])
        right.plot([place + 0.2] * gain["count"], [100 * (a - b) for a, b in pairs], "k.", label=names[1])
        right.annotate(f"{mean:+.1f}", (place - 0.1, mean), ha="right", va="center", fontsize=10)
    right.axhline(0, color=COLORS["lora"], linestyle="--", linewidth=1, label="LoRA")
    right.set(title="difference to LoRA with the same seed", ylabel="points", xlim=(-0.6, len(others) - 0.4))
    for axes, shown in ((left, list(methods)), (right, others)):
        axes.set_xticks(range(len(shown)), [METHODS[method] for method in shown], fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    left.legend(loc="upper center", ncols=2, fontsize=9)
    right.legend(fontsize=9)
    figure.suptitle(f"VL-BART on {dataset}: {summary['num_test']} test questions, {gain['count']} seeds")
    path = runs.path.with_suffix(".png")
    save_figure(figure, path)
    print(f"wrote {path}")
