"""DoRA as the paper's equations compute it, for the memory that the definition takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# documented in "Extending PyTorch", whatever its path
from torch.utils._python_dispatch import TorchDispatchMode

from dora_peft import reference


class MatmulInFp32(TorchDispatchMode):
    """Matrix products of bf16 tensors by way of fp32, many times faster on a CPU without bf16 instructions.

    It sits below autograd: results, and what is kept for backward, have the sizes and dtypes that they have without.
    """

    FUNCTIONS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FUNCTIONS and args[0].dtype == torch.bfloat16:
            return func(*(tensor.float() for tensor in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


class ReferenceLinear(nn.Module):
    """A linear layer by `reference.dora_linear`, whose dense W0 + s B A autograd keeps if the norm has a gradient.

    Dropout acts as in the paper's code, on both branches.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float, detach_norm: bool) -> None:
        super().__init__()
        weight = base_layer.weight
        self.base_layer, self.scaling, self.detach_norm = base_layer, alpha / rank, detach_norm
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        self.magnitude = nn.Parameter(weight.detach().norm(dim=1))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        return reference.dora_linear(
            x, base.weight, self.lora_A, self.lora_B, self.magnitude, self.scaling, base.bias,
            dropped=self.lora_dropout(x) if self.lora_dropout.p else None, dropout_mode="paper",
            detach_norm=self.detach_norm,
        )  # fmt: skip
