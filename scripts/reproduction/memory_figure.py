"""The figure of `scripts/reproduction/memory.py`: memory by method beside the paper's, and the saving by setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.plots import COLORS, OTHER_COLOR, save_figure

# in the order of the claim: the dense algorithm first
METHODS = {
    "reference_not_detached": "DoRA, dense,\nnorm not detached",
    "reference": "DoRA, dense,\nnorm detached",
    "dora_not_detached": "DoRA (ours),\nnorm not detached",
    "dora": "DoRA (ours),\nnorm detached",
    "dora_branch": "DoRA (ours), default:\ndropout on the branch",
    "peft_dora": "DoRA (PEFT)",
    "lora": "LoRA (PEFT)",
    "full": "full fine-tuning",
}
# the dense algorithm computes as PEFT's does
COLOR_OF = {
    "reference_not_detached": "peft_dora", "reference": "peft_dora", "dora_not_detached": "dora", "dora_branch": "dora",
}  # fmt: skip
PAPER_COLOR = "0.3"
TITLES = {"llama": "LLaMA-7B", "vl_bart": "VL-BART"}
# at laptop size
SHRUNK = {"llama": 512, "vl_bart": 64}
# GB
PAPER = {
    "llama": {"reference_not_detached": 37.3, "reference": 28.2},
    "vl_bart": {"reference_not_detached": 23.4, "reference": 20.5},
}


def draw(summary: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> None:
    """Memory at the paper's setting in per cent of the dense algorithm without detaching, and the saving by setting.

    Cases that did not fit into memory are left out. Made to be read at a width of 800 pixels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9.4), layout="constrained")
    devices = ", ".join(dict.fromkeys(machine["device"] for machine in content["machines"]))
    figure.suptitle(
        f"Training memory, {content['settings']['dtype']}, {devices}: {content['settings']['measured']}\n"
        "dropout as in the paper's code, unless it says otherwise",
        fontsize=12,
    )
    for (left, right), (name, found) in zip(figure.subplots(2, 2, width_ratios=[5, 3]), summary.items(), strict=True):
        title = TITLES[name]
        if path.stem.endswith("_dry"):
            title += " at toy size"
        elif content["size"] == "laptop":
            title += f" shrunk {SHRUNK[name]}-fold"
        draw_methods(left, found, PAPER[name])
        left.set_title(f"{title}, batch x length {found['setting']}", fontsize=11)
        draw_savings(right, found)
    save_figure(figure, path)


def draw_methods(axes: Any, found: Mapping[str, Any], paper: Mapping[str, float]) -> None:
    """A bar a method, and the paper's beside it if it has one."""
    values = found["total_mib"][found["setting"]]
    unit = "% of the dense algorithm, not detached"
    if "reference_not_detached" not in values:
        paper, unit = {}, "% of the largest that fitted"
    whole = values.get("reference_not_detached", max(values.values(), default=1.0))
    for place, (method, mib) in enumerate(values.items()):
        offset = 0.2 if method in paper else 0.0
        bars = axes.barh(
            place - offset, 100 * mib / whole, 0.4, color=COLORS.get(COLOR_OF.get(method, method), OTHER_COLOR)
        )
        axes.bar_label(bars, [format_size(mib)], padding=3, fontsize=9)
        if method in paper:
            share = 100 * paper[method] / paper["reference_not_detached"]
            bars = axes.barh(place + offset, share, 0.4, color=PAPER_COLOR)
            axes.bar_label(bars, [f"paper {paper[method]:.1f} GB"], padding=3, fontsize=9)
    axes.set_yticks(range(len(values)), [METHODS[method] for method in values], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=10)
    axes.set_xlim(0, 140 * max(values.values(), default=1.0) / whole)


def draw_savings(axes: Any, found: Mapping[str, Any]) -> None:
    """What detaching saves at each setting that fitted, and as a mark the predicted MiB in the same unit."""
    measured, predicted = found["saving_percent_by_setting"], found["predicted_percent_by_setting"]
    bars = axes.barh(range(len(measured)), measured.values(), 0.5, color=COLORS["peft_dora"], label="measured")
    # the paper's line crosses some
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.bar_label(bars, fmt="%.1f", padding=8, fontsize=9, bbox=behind)
    axes.plot(predicted.values(), range(len(predicted)), "kD", markersize=6, label="predicted: copies of W0 + sBA")
    axes.axvline(found["paper_percent"], color=PAPER_COLOR, linestyle="--", label="paper")
    axes.set_yticks(range(len(measured)), measured, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max([found["paper_percent"], *measured.values(), *predicted.values()]))
    title, sizes = "saved by detaching,\ndense algorithm", {k: format_size(v) for k, v in found["saved_mib"].items()}
    if "measured" in sizes:
        title = f"saved by detaching, dense:\n{sizes['measured']}, predicted {sizes['predicted']}"
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("% of the total, by batch x length", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=9)


def format_size(mib: float) -> str:
    # 10^9 bytes as in the paper
    return f"{mib / 953.67:.1f} GB" if mib >= 1000 else f"{mib:.1f} MiB"
