"""One real DoRA layer in a PEFT model, and the truth about it: the dense reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig, reference
from gpu.registry import Figures

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# What a result may be off beyond twice the error of the same formula in the layer's dtype, relative to its norm. In
# fp32 a product in tf32 would be off by 3e-4.
FLOOR = {FP32: 4e-6, BF16: 2.0**-8, FP16: 2.0**-11}
Gradients = dict[str, Tensor]


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def randn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = FP32) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


class Problem:
    """A layer of `width` in and `out` features with a perturbed adapter of rank r, an input x [2, tokens / 2, in] or,
    for an odd number of tokens, [tokens, in], and a gradient of its output.

    Nearly all checks use the same sizes, all divisible by 16: another size that is not would be compiled anew.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        factors: torch.dtype | None = None,
        *,
        tokens: int = 96,
        width: int = 64,
        out: int = 128,
        r: int = 16,
        bias: bool = True,
        dropout: float = 0.0,
        conv1d: bool = False,
        base: nn.Module | None = None,
    ) -> None:
        self.device, self.dtype, factors = device, dtype, factors or dtype
        if base is None:
            base = Conv1D(out, width) if conv1d else nn.Linear(width, out, bias=bias)
            with torch.no_grad():
                for number, parameter in enumerate(base.parameters()):
                    size = width**-0.5 if parameter.dim() > 1 else 0.1
                    parameter.copy_(size * randn(*parameter.shape, seed=number, device=parameter.device))
            base = base.to(device, dtype)
        config = DoraConfig(r=r, lora_alpha=2 * r, target_modules=["linear"], lora_dropout=dropout)
        self.model: Any = get_peft_model(One(base), config, autocast_adapter_dtype=factors is FP32)
        self.layer = self.model.base_model.model.linear
        self.perturb()
        shape = (2, tokens // 2) if tokens % 2 == 0 else (tokens,)
        self.x = randn(*shape, width, seed=3, device=device, dtype=dtype).requires_grad_()
        self.grad = randn(*shape, out, seed=4, device=device, dtype=dtype)

    @torch.no_grad()
    def perturb(self, seed: int = 5) -> None:
        """A, B and m as in the middle of training."""
        A, B, m = self.trained()
        A.copy_(randn(*A.shape, seed=seed, device=self.device) / A.shape[1] ** 0.5)
        B.copy_(randn(*B.shape, seed=seed + 1, device=self.device) / B.shape[1] ** 0.5 / 4)
        m.mul_(1 + 0.3 * randn(*m.shape, seed=seed + 2, device=self.device).tanh())

    def trained(self, adapter: str = "default") -> tuple[Tensor, Tensor, Tensor]:
        """A [r, in], B [out, r] and m [out]."""
        layer = self.layer
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.lora_magnitude_vector[adapter].weight

    def weight(self) -> Tensor:
        """W0 [out, in]."""
        base = self.layer.get_base_layer()
        return base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()

    def leaves(self) -> dict[str, Tensor]:
        return dict(zip(("x", "A", "B", "m"), (self.x, *self.trained()), strict=True))

    def run(self, forward: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Gradients]:
        """y and the gradients of x, A, B and m by the layer."""
        y = (forward or self.model)(self.x)
        found = torch.autograd.grad(y, list(self.leaves().values()), self.grad.to(y.dtype))
        return y.detach(), dict(zip(self.leaves(), found, strict=True))

    def truth(
        self, dtype: torch.dtype = torch.float64, dropped: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Gradients]:
        """The same by the reference, every operation in `dtype`.

        Args:
            dropped: drop(x) / x, the same shape as x: 0 or 1 / (1 - p).
        """
        leaves = {name: leaf.detach().to(dtype).clone().requires_grad_() for name, leaf in self.leaves().items()}
        x, A, B, m = leaves.values()
        weight = self.weight() if weight is None else weight
        bias = getattr(self.layer.get_base_layer(), "bias", None)
        bias = None if bias is None else bias.detach().to(dtype)
        dropped = None if dropped is None else x * dropped.to(dtype)
        scaling = self.layer.scaling["default"]
        y = reference.dora_linear(x, weight.to(dtype), A, B, m.flatten(), scaling, bias, dropped=dropped)
        found = torch.autograd.grad(y, list(leaves.values()), self.grad.to(dtype))
        return y.detach(), dict(zip(leaves, found, strict=True))

    def compare(
        self,
        figures: Figures,
        found: tuple[Tensor, Gradients] | None = None,
        *,
        dropped: Tensor | None = None,
        weight: Tensor | None = None,
        factor: float = 1.0,
        label: str = "",
    ) -> None:
        """Add the distances of y and of all gradients from the truth; `factor` is what both are multiplied by."""
        y, gradients = self.run() if found is None else found
        (true_y, true), (naive_y, naive) = (self.truth(t, dropped, weight) for t in (torch.float64, self.dtype))
        figures.require(f"{label}dtype of y", y.dtype == self.dtype)
        self.add(figures, f"{label}y", y, factor * true_y, factor * naive_y)
        for name, gradient in gradients.items():
            self.add(figures, f"{label}d{name}", gradient, factor * true[name], factor * naive[name])

    def add(self, figures: Figures, label: str, found: Tensor, true: Tensor, naive: Tensor) -> None:
        """Twice the naive error, and the floor, are allowed."""
        figures.add(label, distance(found.view_as(true), true), 2 * distance(naive, true) + FLOOR[self.dtype])
