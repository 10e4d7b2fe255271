"""Forward and all gradients of one layer against the reference: dtypes, shapes, layouts, and values that are hard."""

from __future__ import annotations

import torch
from torch import nn

from dora_peft import reference
from gpu.problem import BF16, FLOOR, FP16, FP32, Problem, distance
from gpu.registry import Figures, Skipped


def layer_fp32(device: torch.device, figures: Figures) -> None:
    Problem(device, FP32).compare(figures)


def layer_bf16(device: torch.device, figures: Figures) -> None:
    Problem(device, BF16).compare(figures)


def layer_bf16_fp32_adapter(device: torch.device, figures: Figures) -> None:
    """PEFT's default over a bf16 base."""
    Problem(device, BF16, FP32).compare(figures)


def layer_fp16(device: torch.device, figures: Figures) -> None:
    Problem(device, FP16).compare(figures)


def layer_without_bias(device: torch.device, figures: Figures) -> None:
    Problem(device, BF16, bias=False).compare(figures)


def layer_odd_sizes(device: torch.device, figures: Figures) -> None:
    """No size is a multiple of a block's, or of 16."""
    Problem(device, FP16, tokens=37, width=65, out=131, r=3).compare(figures)


def layer_one_token(device: torch.device, figures: Figures) -> None:
    problem = Problem(device, FP32)
    problem.x = problem.x.detach()[:1, :1].clone().requires_grad_()
    problem.grad = problem.grad[:1, :1].clone()
    problem.compare(figures)


def layer_rank_384(device: torch.device, figures: Figures) -> None:
    # in the interpreter 96 ranks, which take more than one pass as well
    r = 384 if device.type == "cuda" else 96
    Problem(device, BF16, FP32, width=r, out=r, r=r).compare(figures)


def layer_conv1d(device: torch.device, figures: Figures) -> None:
    """GPT-2's layer stores W0 transposed."""
    Problem(device, FP32, conv1d=True).compare(figures)


def layer_strided(device: torch.device, figures: Figures) -> None:
    """An input of every second column, and a gradient that is stored by columns."""
    problem = Problem(device, BF16)
    wide = torch.stack([problem.x.detach(), torch.full_like(problem.x, float("nan"))], -1)
    problem.x = wide[..., 0].requires_grad_()
    problem.grad = problem.grad.transpose(0, -1).contiguous().transpose(0, -1)
    problem.compare(figures)


def layer_bias_hides_output(device: torch.device, figures: Figures) -> None:
    """y - b has lost z's digits where the bias is large: m's gradient is computed from x and W0 there."""
    problem = Problem(device, BF16)
    with torch.no_grad():
        problem.layer.get_base_layer().bias[::3] = 300.0
    problem.compare(figures)


def layer_tiny_magnitude(device: torch.device, figures: Figures) -> None:
    """z cannot be read off y = c z where c is about 0."""
    problem = Problem(device, BF16, FP32)
    with torch.no_grad():
        problem.trained()[2][::5] = 1e-38
    problem.compare(figures)


def layer_output_overwritten(device: torch.device, figures: Figures) -> None:
    """As fused kernels do that write over their input, behind autograd's back."""
    problem = Problem(device, BF16)
    y = problem.model(problem.x)
    before = y.detach().clone()
    with torch.no_grad():
        y.zero_()
    found = torch.autograd.grad(y, list(problem.leaves().values()), problem.grad)
    problem.compare(figures, (before, dict(zip(problem.leaves(), found, strict=True))))


layer_output_overwritten.expected_warning = "Other code overwrites the outputs of DoRA modules"  # type: ignore[attr-defined]


@torch.no_grad()
def layer_evaluation(device: torch.device, figures: Figures) -> None:
    """Without gradient the layer takes other ways; twice, since the second pass takes what the first kept."""
    problem = Problem(device, BF16)
    problem.model.eval()
    with torch.enable_grad():
        (true, _), (naive, _) = (problem.truth(dtype) for dtype in (torch.float64, BF16))
    for label in ("first y", "second y"):
        problem.add(figures, label, problem.model(problem.x), true, naive)


def layer_autocast(device: torch.device, figures: Figures) -> None:
    """A base in fp32 under autocast to bf16."""
    problem = Problem(device, FP32)
    with torch.autocast(device.type, dtype=BF16):
        y, gradients = problem.run()
    figures.require("y is bf16", y.dtype == BF16)
    true_y, true = problem.truth()
    figures.add("y", distance(y, true_y), 4 * FLOOR[BF16])
    for name, gradient in gradients.items():
        figures.require(f"d{name} is fp32", gradient.dtype == FP32)
        figures.add(f"d{name}", distance(gradient, true[name]), 4 * FLOOR[BF16])


def layer_large(device: torch.device, figures: Figures) -> None:
    """8,192 tokens at an 8B model's widths; in the interpreter far fewer."""
    size = {"tokens": 8192, "width": 4096, "out": 1024} if device.type == "cuda" else {"tokens": 192, "width": 128}
    Problem(device, BF16, **size).compare(figures)


def layer_past_2_31_elements(device: torch.device, figures: Figures) -> None:
    """A gradient of more than 2^31 elements by columns: offsets of 32 bits would wrap. It takes 25 GB of the GPU's."""
    tokens, out = (65600, 32768) if device.type == "cuda" else (128, 64)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free < 30e9:
            raise Skipped(f"it takes 30 GB of the GPU's memory, and {free / 1e9:.0f} are free")
    base = nn.Linear(16, out, bias=False).to(device, BF16).requires_grad_(False)
    problem = Problem(device, BF16, tokens=16, width=16, out=out, base=base)
    torch.manual_seed(0)
    x = torch.randn(tokens, 16, device=device, dtype=BF16)
    g = torch.randn(out, tokens, device=device, dtype=BF16).T
    A, B, m = problem.trained()
    y = problem.model(x)
    d_m, d_B = torch.autograd.grad(y, (m, B), g)
    W0, A, B = (tensor.detach().float() for tensor in (problem.weight(), A, B))
    s = problem.layer.scaling["default"]
    norm = reference.weight_norm(W0, A, B, s)
    # the first columns and the last, whose elements lie behind all others
    for label, columns in (("first", slice(0, 64)), ("last", slice(out - 64, out))):
        part = g[:, columns].float()
        direction = (W0 + s * B @ A)[columns] / norm[columns, None]
        z = x.float() @ direction.T
        scale = m.detach()[columns].float()
        figures.add(f"{label} columns of y", distance(y.detach()[:, columns], scale * z), 4 * FLOOR[BF16])
        figures.add(f"{label} rows of dm", distance(d_m[columns], (part * z).sum(0)), 8 * FLOOR[BF16])
        expected = s * (part * (scale / norm[columns])).T @ (x.float() @ A.T)
        figures.add(f"{label} rows of dB", distance(d_B[columns], expected), 8 * FLOOR[BF16])
