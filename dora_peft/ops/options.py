"""What a linear layer's computation is given besides tensors: decided once, and kept by a layer between calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import choice
from .overwritten import Outputs
from .products import Products

# Gives x W0^T without b for some rows of W0, for all if None.
ProductOfRows = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Options:
    """What `_Linear` is given besides tensors.

    Attributes:
        scaling: s.
        dropout_p: Probability to drop an element of x before A.
        dtype: That of the products.
        autocast_dtype: What autocast computes in, None without autocast.
        kernels: The module `kernels.fused` if Triton's kernels compute, else None.
        products: How torch's operations multiply.
        base_product: See `linear`.
        outputs: What is known about the layer's outputs, kept between calls.
    """

    scaling: float
    dropout_p: float
    dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    kernels: ModuleType | None
    products: Products
    base_product: ProductOfRows | None
    outputs: Outputs


def options_for(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    c: Tensor,
    scaling: float,
    weight: Tensor | None,
    base_out: Tensor | None,
    base_product: ProductOfRows | None,
    dropout_p: float,
    outputs: Outputs | None,
) -> Options:
    """The options of `linear` for these arguments, at the present implementation and autocast."""
    device, dtype, lowered = x.device.type, x.dtype if base_out is None else base_out.dtype, None
    if torch.is_autocast_enabled(device):
        lowered = torch.get_autocast_dtype(device)
        if base_out is None and dtype is not torch.float64:
            dtype = lowered
    kernels = choice.layer_kernels() if choice.uses_kernels(x.device, dtype, c.dtype) else None
    products = Products()
    if kernels is None:
        products = Products.of(weight, lora_A, lora_B, dtype, composes=lowered is None)
    outputs = Outputs() if outputs is None else outputs
    return Options(scaling, dropout_p, dtype, lowered, kernels, products, base_product, outputs)
