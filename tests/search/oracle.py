"""What a DoRA model should compute, densely and from the paper alone; it shares no code with the package.

Per output row of a frozen weight W0, with the factors A and B and the scaling s of one adapter:

    W' = c (W0 + s B A),   c = m / ||W0 + s B A||

The norm is a constant of the backward pass unless `detach` is False, and the bias stays outside of c. Several active
adapters compose in their order, each with the norm of its own change of W0: W = c2 (c1 (W0 + d1) + d2). A row that was
zero when its adapter was created is tied: c = 1 there, and m gets no gradient. Gradients come from autograd.

A row is an output feature: of a linear layer, an embedding dimension, or an output channel of a convolution whose
kernel is flattened. A grouped convolution is one over all channels whose kernel is zero outside of its group, since
PEFT's A crosses the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[str, Tensor], Tensor]


@dataclass
class Adapter:
    """One adapter of one layer, with tensors in the shapes that PEFT stores.

    Attributes:
        lora_A, lora_B: None where the magnitude is trained alone.
        magnitude: m, of as many elements as there are rows.
        scaling: s.
        tied: Rows that were zero at creation, [out] of bool.
        detach: Whether the norm is a constant of the backward pass.
    """

    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor
    scaling: float
    tied: Tensor
    detach: bool = True


@dataclass
class Layer:
    """A base layer and its active adapters in order.

    Attributes:
        kind: "linear", "transposed" (transformers' Conv1D), "embedding" or "convolution".
        weight, bias: As the base layer stores them.
        merged: W' [out, in] that was written over W0; the adapters are then of no effect.
        stride, padding, groups: Of a convolution.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    merged: Tensor | None = None
    stride: int = 1
    padding: int = 0
    groups: int = 1


def as_matrix(layer: Layer) -> Tensor:
    """W0 as [out, in]."""
    if layer.kind in ("transposed", "embedding"):
        return layer.weight.T
    if layer.groups == 1:
        return layer.weight.flatten(1)
    out_features, width = layer.weight.shape[:2]
    per_group = out_features // layer.groups
    dense = layer.weight.new_zeros(out_features, width * layer.groups, *layer.weight.shape[2:])
    for group in range(layer.groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        dense[rows, group * width : (group + 1) * width] = layer.weight[rows]
    return dense.flatten(1)


def matrices(layer: Layer, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    """A [r, in] and B [out, r], None where the magnitude is trained alone."""
    if adapter.lora_A is None or adapter.lora_B is None:
        return None
    lora_A, lora_B = adapter.lora_A.flatten(1), adapter.lora_B.flatten(1)
    return lora_A, lora_B if layer.groups == 1 else torch.block_diag(*lora_B.chunk(layer.groups))


def change(layer: Layer, adapter: Adapter) -> Tensor | float:
    """d = s B A as [out, in], 0 where the magnitude is trained alone."""
    factors = matrices(layer, adapter)
    return 0.0 if factors is None else adapter.scaling * (factors[1] @ factors[0])


def scale(layer: Layer, adapter: Adapter) -> Tensor:
    """c [out], 1 on tied rows."""
    squared = (as_matrix(layer) + change(layer, adapter)).square().sum(1)
    norm = torch.where(adapter.tied, torch.ones_like(squared), squared).sqrt()
    c = adapter.magnitude.flatten() / (norm.detach() if adapter.detach else norm)
    return torch.where(adapter.tied, torch.ones_like(c), c)


def compose(layer: Layer) -> Tensor:
    """The weight with all adapters, [out, in]."""
    matrix = as_matrix(layer)
    for adapter in layer.adapters.values():
        matrix = scale(layer, adapter)[:, None] * (matrix + change(layer, adapter))
    return matrix


def multiply(layer: Layer, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the base layer computes, with another matrix."""
    if layer.kind == "embedding":
        return F.embedding(x, matrix.T)
    if layer.kind == "convolution":
        kernel = matrix.view(matrix.shape[0], -1, *layer.weight.shape[2:])
        convolve = {3: F.conv1d, 4: F.conv2d}[kernel.dim()]
        return convolve(x, kernel, bias, layer.stride, layer.padding)
    return F.linear(x, matrix, bias)


def apply(layer: Layer, x: Tensor) -> Tensor:
    """The layer's output, from the composed weight."""
    return multiply(layer, x, compose(layer) if layer.merged is None else layer.merged, layer.bias)


def apply_branches(layer: Layer, x: Tensor) -> Tensor:
    """The same from a base product and low-rank ones, which rounds otherwise: y = c (x W0^T + s (x A^T) B^T) + b."""
    if layer.merged is not None:
        return apply(layer, x)
    channels = 1 if layer.kind == "convolution" else -1
    y = multiply(layer, x, as_matrix(layer)).movedim(channels, -1)
    for adapter in layer.adapters.values():
        factors = matrices(layer, adapter)
        if factors is not None:
            u = multiply(layer, x, factors[0]).movedim(channels, -1)
            y = y + adapter.scaling * (u @ factors[1].T)
        y = y * scale(layer, adapter)
    return (y if layer.bias is None else y + layer.bias).movedim(-1, channels)


def cast(layers: Mapping[str, Layer], dtype: torch.dtype) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Copies of the layers in `dtype`, and their trainable tensors as leaves, named "layer.adapter.A", B and m."""
    leaves: dict[str, Tensor] = {}
    out = {}

    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype)

    def leaf(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None:
            tensor = leaves[name] = tensor.detach().to(dtype, copy=True).requires_grad_()
        return tensor

    for name, layer in layers.items():
        adapters = {}
        for key, adapter in layer.adapters.items():
            stored = {"A": adapter.lora_A, "B": adapter.lora_B, "m": adapter.magnitude}
            made = {letter: leaf(f"{name}.{key}.{letter}", tensor) for letter, tensor in stored.items()}
            adapters[key] = replace(adapter, lora_A=made["A"], lora_B=made["B"], magnitude=made["m"])
        out[name] = replace(
            layer, weight=to(layer.weight), bias=to(layer.bias), merged=to(layer.merged), adapters=adapters
        )
    return out, leaves


def evaluate(
    layers: Mapping[str, Layer],
    x: Tensor,
    network: Callable[[Tensor, Call], Tensor],
    probe: Tensor,
    dtype: torch.dtype,
    apply: Callable[[Layer, Tensor], Tensor] = apply,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of sum(output * probe), every operation in `dtype`.

    Args:
        apply: `apply` or `apply_branches`.
        network: Computes the whole model's output from x and a function that applies a layer by name.

    Returns:
        The output, and gradients by the names of `cast`, "x" among them where x is not made of ids.
    """
    copies, leaves = cast(layers, dtype)
    if x.is_floating_point():
        x = leaves["x"] = x.detach().to(dtype, copy=True).requires_grad_()
    y = network(x, lambda name, value: apply(copies[name], value))
    # ids through an adapter that is merged or disabled
    if not y.requires_grad:
        return y, {}
    gradients = torch.autograd.grad(y, list(leaves.values()), probe.to(dtype), allow_unused=True)
    named = zip(leaves, gradients, strict=True)
    return y.detach(), {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in named}


def combined(layer: Layer, weights: list[float]) -> Tensor:
    """W0 + sum_i w_i (W'_i - W0): what a weighted sum of the layer's adapters means, [out, in]."""
    original = as_matrix(layer)
    single = [compose(replace(layer, adapters={name: adapter})) for name, adapter in layer.adapters.items()]
    return original + sum(w * (matrix - original) for w, matrix in zip(weights, single, strict=True))
