"""What stands behind a layer and what it does to the layer's output: some keep it, some change it in place, and some
write over it through a raw pointer, as fused kernels do, of which neither autograd nor a version counter learns.

Each has a pure twin for the oracle, in `pure`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_raw(target: Tensor, values: Tensor | float) -> None:
    """Overwrite `target` without moving its version counter."""
    values = torch.as_tensor(values, dtype=target.dtype).expand(target.shape).contiguous()
    # numpy knows no bf16
    integers = _INTEGERS[target.element_size()]
    target.detach().view(integers).numpy()[...] = values.detach().view(integers).numpy()


def _silu_gradient(y: Tensor, grad: Tensor) -> Tensor:
    s = torch.sigmoid(y)
    return grad * (s + y * s * (1 - s))


def rotation(y: Tensor) -> Tensor:
    """Factors in the shape of y: other than 1 in half of the columns, and not in the first row, whose angle is 0."""
    columns = torch.arange(y.shape[1], device=y.device) % 2
    factors = 1 - 1.5 * columns.to(y.dtype).view(1, -1, *(1 for _ in y.shape[2:])).expand(y.shape)
    return torch.cat([torch.ones_like(factors[:1]), factors[1:]])


class RotateInPlace(torch.autograd.Function):
    """y * rotation, written over y in the forward pass (Liger's RoPE)."""

    @staticmethod
    def forward(ctx, y):
        write_raw(y, y * rotation(y))
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * rotation(grad)


class GradientOverOutput(torch.autograd.Function):
    """silu(y), whose backward pass writes dy over y and returns y's own storage (Liger's SwiGLU)."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return F.silu(y)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        write_raw(y, _silu_gradient(y, grad))
        return y


class ScribbleOverOutput(torch.autograd.Function):
    """silu(y), whose backward pass uses y's memory for something else."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return F.silu(y)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        out = _silu_gradient(y, grad)
        write_raw(y, 7.0)
        return out


def relu_in_place(y: Tensor, note: Callable[[Tensor], None]) -> Tensor:
    """relu_, noting where y is positive: rounding decides near 0, and the oracle follows the decision."""
    note(y.detach() > 0)
    return y.relu_()


APPLY = {
    "silu": lambda y, note: F.silu(y),
    "double": lambda y, note: y * 2,
    "relu_": relu_in_place,
    "mul_": lambda y, note: y.mul_(-0.5),
    "rotate in place": lambda y, note: RotateInPlace.apply(y),
    "gradient over output": lambda y, note: GradientOverOutput.apply(y),
    "scribble over output": lambda y, note: ScribbleOverOutput.apply(y),
}
NAMES = list(APPLY)
# what torch.compile and tracing can follow
PLAIN = ["silu", "double", "mul_"]


def pure(name: str, y: Tensor, mask: Tensor | None) -> Tensor:
    """What the consumer computes, in place of nothing."""
    if name == "double":
        return y * 2
    if name == "mul_":
        return y * -0.5
    if name == "relu_":
        assert mask is not None
        return y * mask
    if name == "rotate in place":
        return y * rotation(y.detach())
    return F.silu(y)
