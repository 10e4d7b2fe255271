"""DoRA's linear layer in a training pass under torch.compile, by operations that the compiler sees through.

Elsewhere v is looked up, and computed again if what it was made of has changed. To the compiler that is a call of
Python that it knows nothing of, and on a CPU such a call takes longer than v itself. Here the graph makes W0 + s B A,
v from it, and the output's product by it, which spares the product with B and a pass over [N, out]:

    W' = W0 + s B A          v = ||W'||          y = m / v * (x W'^T) + b

Backward multiplies by W0, A and B apart: W' is not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .norm import floor

# Largest W' in bytes: it is made as a whole. Of larger weights the call of Python is a small part anyway.
MOST_BYTES = 64 * 2**20


def can_compose(weight: Tensor, *others: Tensor) -> bool:
    """Whether W' [out, in] may be made in the graph: on a CPU, of tensors in one dtype that norms are computed in."""
    if weight.dtype not in (torch.float32, torch.float64) or weight.nbytes > MOST_BYTES:
        return False
    return all(t.device.type == "cpu" and t.dtype is weight.dtype for t in (weight, *others))


def composed_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """W' [out, in] and v [out], without gradients."""
    with torch.no_grad():
        composed = weight + scaling * (lora_B @ lora_A)
        norm = torch.linalg.vector_norm(composed, dim=1)
        return composed, torch.maximum(norm, floor(weight.square().sum(1)))


def composed_product(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, weight: Tensor, composed: Tensor, scaling: float
) -> Tensor:
    """x W'^T [..., out]; differentiable once, with respect to x [..., in], A and B."""
    return _ComposedProduct.apply(x, lora_A, lora_B, weight, composed, scaling)


class _ComposedProduct(torch.autograd.Function):
    """With g = dL/dz, u = x A^T and du = s g B:

    dx = g W0 + du A          dA = du^T x          dB = s g^T u
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, weight, composed, scaling):
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, rows @ lora_A.T, lora_A, lora_B, weight)
        ctx.scaling, ctx.shape = scaling, x.shape
        return (rows @ composed.T).view(*x.shape[:-1], composed.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, u, lora_A, lora_B, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        du = g @ (lora_B * ctx.scaling)
        dx = (g @ weight + du @ lora_A).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_A = du.T @ rows if ctx.needs_input_grad[1] else None
        d_B = (u.T @ g).T * ctx.scaling if ctx.needs_input_grad[2] else None
        return dx, d_A, d_B, None, None, None
