"""How changes of magnitude and of direction go together, in the records of `dora_peft.analysis`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .history import History


class Correlation(NamedTuple):
    """Pearson's r of dD and dM, its confidence interval, and the number of points; nan if undefined."""

    r: float
    low: float
    high: float
    # over tuple.count, which nobody calls here
    count: int  # type: ignore[assignment]


def correlate(history: History, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Correlation:
    """Pearson's correlation of dD and dM over modules and checkpoints, as in the paper's Fig. 2.

    The points of one module at several checkpoints are not independent, so the percentile bootstrap of the interval
    draws modules, each with all of its points.

    Args:
        history: The records.
        level: Of the interval.
        draws: How often modules are drawn.
        seed: Of the draws.

    Returns:
        r is nan if dD or dM is constant or not finite, the interval also with one module.

    Raises:
        ValueError: No level between 0 and 1, or no draw.
    """
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"expected a level between 0 and 1 and at least 1 draw, found {level} and {draws}")
    points = torch.tensor([[e["direction"], e["magnitude"]] for e in history], dtype=torch.float64).view(-1, 2)
    if not len(points) or not points.isfinite().all() or (points.amax(0) == points.amin(0)).any():
        return Correlation(math.nan, math.nan, math.nan, len(points))
    number = {name: i for i, name in enumerate(dict.fromkeys(entry["module"] for entry in history))}
    x, y = ((points - points.mean(0)) / (points.amax(0) - points.amin(0))).unbind(1)
    powers = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    sums = torch.zeros(len(number), 6, dtype=torch.float64)
    sums.index_add_(0, torch.tensor([number[entry["module"]] for entry in history]), powers)
    picks = torch.randint(len(number), (draws, len(number)), generator=torch.Generator().manual_seed(seed))
    drawn = _pearson(
        torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(
            1, picks, torch.ones(picks.shape, dtype=torch.float64)
        )
        @ sums
    )
    drawn = drawn[drawn.isfinite()]
    low = high = math.nan
    if len(number) > 1 and len(drawn):
        low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Correlation(_pearson(sums.sum(0)).item(), low, high, len(points))


def correlate_by_step(
    history: History, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> dict[int, Correlation]:
    """`correlate` at each checkpoint alone.

    Over several checkpoints both changes grow, which pushes r up whatever the modules do; here it cannot.
    """
    steps = sorted({entry["step"] for entry in history})
    return {step: correlate([e for e in history if e["step"] == step], level, draws, seed) for step in steps}


def _pearson(sums: Tensor) -> Tensor:
    """r from the sums [..., 6] of 1, x, y, x^2, y^2 and xy; nan if x or y is constant up to rounding."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    var_x, var_y = xx - x * x / n, yy - y * y / n
    r = (xy - x * y / n) / (var_x * var_y).clamp(min=0).sqrt()
    return r.masked_fill((var_x <= 1e-12 * xx) | (var_y <= 1e-12 * yy), math.nan).clamp(-1, 1)
