"""Dropout of the low-rank branch: its mask is drawn in three kernels, which have to agree on it.

The mask is read off dx = g' W0 + mask * (du A) / (1 - p), element by element, in fp32. It is a function of the seed
that torch's generator gives, and so it is the same for any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpu.problem import BF16, FP32, Problem
from gpu.registry import Figures

SEED = 7


def read_mask(problem: Problem, p: float) -> Tensor:
    """mask / (1 - p), the shape of x, of the pass that SEED gives."""
    torch.manual_seed(SEED)
    _, gradients = problem.run()
    with_all, without = (problem.truth(dropped=torch.full_like(problem.x, k))[1]["x"] for k in (1.0, 0.0))
    ratio = (gradients["x"].double() - without) / (with_all - without)
    return (ratio > 0.5).to(problem.x.dtype) / (1 - p)


def dropout_layer(device: torch.device, figures: Figures) -> None:
    """Forward and all gradients, with p = 1/2, whose 1 - p is exact."""
    problem = Problem(device, FP32, width=320, dropout=0.5)
    dropped = read_mask(problem, 0.5)
    for dtype in (FP32, BF16):
        problem = Problem(device, dtype, FP32, width=320, dropout=0.5)
        torch.manual_seed(SEED)
        problem.compare(figures, dropped=dropped, label=f"{str(dtype).removeprefix('torch.')} ")


def dropout_share(device: torch.device, figures: Figures) -> None:
    """The share of what is kept, and neighbours that know nothing of each other."""
    p = 0.1
    problem = Problem(device, FP32, width=320, tokens=192, dropout=p)
    mask = (read_mask(problem, p).flatten(0, -2) > 0).double()
    n, variance = mask.numel(), p * (1 - p)
    # 5 standard deviations
    figures.add("share kept", abs(mask.mean().item() - (1 - p)), 5 * (variance / n) ** 0.5)
    rest = mask - (1 - p)
    neighbours = {
        "columns": rest[:, 1:] * rest[:, :-1],
        "columns that share a draw": rest[:, 8:] * rest[:, :-8],
        "tokens": rest[1:] * rest[:-1],
    }
    for label, product in neighbours.items():
        figures.add(f"correlation of {label}", abs(product.mean().item()) / variance, 5 / n**0.5)


def dropout_seeds(device: torch.device, figures: Figures) -> None:
    """torch.manual_seed decides; two passes after it differ."""
    problem = Problem(device, BF16, FP32, width=320, dropout=0.5)
    torch.manual_seed(SEED)
    first, second = problem.run()[0], problem.run()[0]
    torch.manual_seed(SEED)
    figures.require("the same seed gives the same y", torch.equal(first, problem.run()[0]))
    figures.require("the next pass another", not torch.equal(first, second))
    problem.model.eval()
    problem.compare(figures, label="evaluation ")


def dropout_recomputed(device: torch.device, figures: Figures) -> None:
    """Activation checkpointing computes the forward pass again, with the same mask."""
    problem = Problem(device, BF16, FP32, width=320, dropout=0.5)
    torch.manual_seed(SEED)
    y, expected = problem.run()
    torch.manual_seed(SEED)
    again, found = problem.run(lambda x: checkpoint(problem.model, x, use_reentrant=False))
    figures.require("y", torch.equal(y, again))
    for name, gradient in found.items():
        figures.require(f"d{name}", torch.equal(gradient, expected[name]))
