"""A benchmark's results as text and as bars."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS
from common.plots import COLORS, OTHER_COLOR, save_figure

RESULTS = Path(__file__).resolve().parent / "results"
QUANTITIES = {
    "time_ms": "time, ms",
    "saved_mib": "kept for backward, MiB",
    "peak_mib": "peak over the loaded model, MiB",
    "resident_mib": "resident memory added, MiB",
    "refresh_ms": "one norm, ms",
    "norm_error": "largest relative error of a norm",
    "norms_per_step": "norms per layer and optimizer step",
}


def format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def describe(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def format_result(result: Mapping[str, Any]) -> str:
    """One line a contender: median [quartiles] and, if there is a reference, ratio [quartiles] to it."""
    rows = [["", QUANTITIES[result["quantity"]], "", f"to {result['reference']}", ""]]
    for name, found in result["contenders"].items():
        row = [name, format_value(found["median"]), f"[{format_value(found['q1'])}, {format_value(found['q3'])}]"]
        if "ratio" in found:
            row += [f"{found['ratio']:.3f}", f"[{found['ratio_q1']:.3f}, {found['ratio_q3']:.3f}]"]
        rows.append(row + [""] * (5 - len(row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([describe(result["setting"]), *lines])


def color(name: str) -> str:
    return COLORS.get(CONTENDERS[name][0], OTHER_COLOR)


def draw_ratios(report: Mapping[str, Any], path: Path) -> None:
    """Bars of the ratios to the reference with whiskers from quartile to quartile, one panel a setting."""
    from matplotlib.figure import Figure

    results = [r for r in report["results"] if any("ratio" in found for found in r["contenders"].values())]
    if not results:
        return
    settings = [r["setting"] for r in results]
    shared = {key: value for key, value in settings[0].items() if all(s.get(key) == value for s in settings)}
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    bars_per_panel = max(len(r["contenders"]) for r in results)
    size = (4.6 * columns, rows * (0.9 + 0.32 * bars_per_panel) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    heading = f"{report['options']['suite']}, {report['options']['model']}, {report['options']['layers']} layers"
    common = textwrap.fill(describe(shared), 60 * columns)
    figure.suptitle(f"{heading}, {report['processor']}\n{common}", fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, result in zip(panels, results, strict=False):
        found = {name: values for name, values in result["contenders"].items() if "ratio" in values}
        ratios = [values["ratio"] for values in found.values()]
        spread = [
            [values["ratio"] - values["ratio_q1"] for values in found.values()],
            [values["ratio_q3"] - values["ratio"] for values in found.values()],
        ]
        bars = axes.barh(list(found), ratios, xerr=spread, color=[color(name) for name in found], ecolor="black")
        labels = axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=4, fontsize=8, zorder=3)
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(f"{QUANTITIES[result['quantity']].rpartition(', ')[0] or 'error'} / {result['reference']}'s")
        axes.xaxis.label.set_size(8)
        own = {key: value for key, value in result["setting"].items() if key not in shared}
        axes.set_title(describe(own), fontsize=8)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    save_figure(figure, path)
