"""v = ||W0 + s B A||: its error, and that it follows whatever changes under it."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig, reference
from gpu.problem import BF16, FP32, One, Problem, randn
from gpu.registry import Figures

# largest relative error of a norm in fp32; the products are of 22 bits or more
ALLOWED = 2e-6


def add_norm(device: torch.device, figures: Figures, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """The magnitude of a new adapter whose B is not 0 is v."""
    out, width, r = size
    linear = nn.Linear(width, out, bias=False).to(device, dtype)
    with torch.no_grad():
        linear.weight.copy_(randn(out, width, seed=1, device=device) / width**0.5)
    config = DoraConfig(r=r, lora_alpha=r, target_modules=["linear"], init_lora_weights=False)
    layer = get_peft_model(One(linear), config).base_model.model.linear
    A, B = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
    true = reference.weight_norm(linear.weight.detach().double(), A, B, layer.scaling["default"])
    found = layer.lora_magnitude_vector["default"].weight.detach().double()
    figures.add(f"v {out} x {width}, r={r}, {dtype}", ((found - true).abs() / true).max().item(), ALLOWED)


def norm_at_creation(device: torch.device, figures: Figures) -> None:
    for dtype in (FP32, BF16):
        add_norm(device, figures, dtype, (128, 64, 16))
    add_norm(device, figures, FP32, (131, 65, 3))


def norm_large(device: torch.device, figures: Figures) -> None:
    add_norm(device, figures, BF16, (4096, 4096, 16) if device.type == "cuda" else (256, 128, 16))


def norm_rank_384(device: torch.device, figures: Figures) -> None:
    add_norm(device, figures, BF16, (4096, 4096, 384) if device.type == "cuda" else (384, 384, 384))


def norm_after_edit_of_factors(device: torch.device, figures: Figures) -> None:
    """An optimizer's step, then edits that no version counter shows and that no sum of values would."""
    problem = Problem(device, FP32)
    problem.compare(figures, label="before: ")
    optimizer = torch.optim.AdamW(problem.trained(), lr=0.05, weight_decay=0.0)
    problem.model(problem.x).backward(problem.grad)
    optimizer.step()
    problem.x.grad = None
    problem.compare(figures, label="after a step: ")
    A, B, _ = problem.trained()
    A.data[3, 5].neg_()
    problem.compare(figures, label="after one sign of A: ")
    B.data.copy_(B.data.flip(0))
    problem.compare(figures, label="after B by other rows: ")


def norm_after_edit_of_base(device: torch.device, figures: Figures) -> None:
    problem = Problem(device, FP32)
    problem.compare(figures, label="before: ")
    base = problem.layer.get_base_layer()
    with torch.no_grad():
        base.weight.mul_(1.5)
    problem.compare(figures, label="in place: ")
    base.weight = nn.Parameter(2 * base.weight.detach().roll(1, 0), requires_grad=False)
    problem.compare(figures, label="another tensor: ")


def norm_that_cancels(device: torch.device, figures: Figures) -> None:
    """Every third row of W0 + s B A is a tenth of W0: ||W0||^2 + 2 s W0 . B A + ... would lose digits."""
    problem = Problem(device, FP32)
    A, B, _ = problem.trained()
    with torch.no_grad():
        weight = problem.layer.get_base_layer().weight
        rest = 0.1 * weight.clone()
        weight[::3] = (rest - problem.layer.scaling["default"] * B @ A)[::3]
    problem.compare(figures)
