"""The figures of `dora_peft.analysis`: dM over dD, and both over the optimizer steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from .._files import staged_directory
from .correlation import correlate, correlate_by_step
from .history import History

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

Target = str | os.PathLike[str] | IO[bytes]


def layer_kind(module_path: str) -> str:
    """The last component of a module's path, such as "q_proj"."""
    return module_path.rpartition(".")[2]


def _depth(module_path: str) -> int:
    """The number of the layer, the first one in the path."""
    return next((int(part) for part in module_path.split(".") if part.isdigit()), 0)


def draw_pattern(histories: Mapping[str, History], title: str, path: Target, *, level: float = 0.95) -> None:
    """Draw dM over dD, one panel per method: colour by optimizer step, size by depth, regression line, r.

    Args:
        histories: Records by method, such as `DecompositionCallback.history`.
        title: Of the whole figure.
        path: A file, whose suffix says the format, or a binary buffer for a PNG.
        level: Of the interval.
    """
    figure, panels = _figure(title, 1, list(histories), (4.2, 4.0))
    entries = [entry for history in histories.values() for entry in history]
    steps, depths = [e["step"] for e in entries], [_depth(e["module"]) for e in entries]
    points = []
    for axes, (method, history) in zip(panels[0], histories.items(), strict=True):
        x, y = [e["direction"] for e in history], [e["magnitude"] for e in history]
        largest = 60 if len(history) < 200 else 25
        size = [8 + largest * _depth(e["module"]) / max(1, *depths) for e in history]
        points.append(
            axes.scatter(
                x, y, s=size, c=[e["step"] for e in history], cmap="viridis", vmin=min(steps), vmax=max(steps),
                alpha=0.7, edgecolors="white", linewidths=0.4,
            )
        )  # fmt: skip
        r, low, high, _ = correlate(history, level)
        if math.isfinite(r):
            mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
            slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
                (a - mean_x) ** 2 for a in x
            )
            ends = min(x), max(x)
            axes.plot(ends, [mean_y + slope * (end - mean_x) for end in ends], "--", color="0.25", linewidth=1.2)
        axes.set_title(f"{method}\nr = {r:+.2f} [{low:+.2f}, {high:+.2f}]", fontsize="medium", pad=14)
        axes.set_xlabel("change of direction \u0394D")
        axes.ticklabel_format(style="sci", scilimits=(-2, 3))
        axes.locator_params(nbins=5)
    panels[0, 0].set_ylabel("change of magnitude \u0394M")
    if len(set(steps)) > 1:
        ticks = sorted(set(steps)) if len(set(steps)) < 10 else None
        figure.colorbar(points[-1], ax=list(panels[0]), label="optimizer step", ticks=ticks)
    if len(set(depths)) > 1:
        figure.supxlabel("larger markers: deeper layers", fontsize="small")
    _save(figure, path)


def draw_trajectories(histories: Mapping[str, History], title: str, path: Target) -> None:
    """Draw the mean dM and dD over the optimizer steps, one panel of each per kind of layer, one line per method.

    Args:
        histories, title, path: As for `draw_pattern`.
    """
    kinds = list(dict.fromkeys(layer_kind(e["module"]) for history in histories.values() for e in history))
    width = min(4, len(kinds))
    blocks = [kinds[start : start + width] for start in range(0, len(kinds), width)]
    figure, panels = _figure(title, 2 * len(blocks), ["" for _ in range(width)], (2.4, 2.0))
    measures: list[tuple[Literal["magnitude", "direction"], str]] = [("magnitude", "\u0394M"), ("direction", "\u0394D")]
    for number, (key, label) in enumerate(measures):
        # magnitudes that are trained alone turn nothing, and 0 has no logarithm
        scale = "log" if all(e[key] > 0 for history in histories.values() for e in history) else "linear"
        for place, kind in enumerate(kinds):
            axes = panels[number * len(blocks) + place // width, place % width]
            for method, history in histories.items():
                values: dict[int, list[float]] = {}
                for entry in history:
                    if layer_kind(entry["module"]) == kind:
                        values.setdefault(entry["step"], []).append(entry[key])
                axes.plot(sorted(values), [sum(values[s]) / len(values[s]) for s in sorted(values)], ".-", label=method)
            axes.set(title=kind, yscale=scale)
            axes.grid(alpha=0.3)
            axes.locator_params(axis="x", nbins=4)
            if place % width == 0:
                axes.set_ylabel(f"mean {label}")
            # nothing stands below, or only the other half of the figure
            if place + width >= len(kinds):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("optimizer step")
    for axes in panels.flat:
        if not axes.lines:
            axes.remove()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(histories))
    _save(figure, path)


def draw_correlations(
    groups: Mapping[str, Mapping[str, History]], title: str, path: Target, *, level: float = 0.95
) -> None:
    """Draw r of dD and dM at each checkpoint with its interval, one panel per group, one line per method.

    Args:
        groups: For each group of modules the records by method.
        title, path, level: As for `draw_pattern`.
    """
    figure, panels = _figure(title, 1, list(groups), (4.2, 3.6))
    for axes, (group, histories) in zip(panels[0], groups.items(), strict=True):
        for number, (method, history) in enumerate(histories.items()):
            found = {step: c for step, c in correlate_by_step(history, level).items() if math.isfinite(c.low)}
            steps = sorted({entry["step"] for entry in history})
            # beside one another: the intervals of several methods overlap
            shift = (number - (len(histories) - 1) / 2) * 0.1 * (steps[-1] - steps[0] or 1) / len(steps)
            bars = [[c.r - c.low for c in found.values()], [c.high - c.r for c in found.values()]]
            places, values = [step + shift for step in found], [c.r for c in found.values()]
            axes.errorbar(places, values, [[max(0.0, b) for b in side] for side in bars], fmt="o-", label=method)
        axes.axhline(0, color="0.25", linewidth=0.8)
        axes.set(title=group, xlabel="optimizer step", ylim=(-1.05, 1.05))
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("r of \u0394D and \u0394M at that step alone")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, path)


def _figure(title: str, rows: int, columns: Sequence[str], size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    if not columns:
        raise ValueError("expected records of at least one method to draw, found none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(size[0] * len(columns) + 0.8, size[1] * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(
        rows, len(columns), squeeze=False, sharex=rows > 1, sharey="row" if rows > 1 else False
    )


def _save(figure: Figure, path: Target) -> None:
    if not isinstance(path, (str, os.PathLike)):
        figure.savefig(path, format="png", dpi=150)
        return
    with staged_directory(str(Path(path).parent)) as staging:
        figure.savefig(Path(staging) / Path(path).name, dpi=150)
