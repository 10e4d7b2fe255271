"""DoRA on convolutions: norms run over the flattened kernel, m is [1, out, 1, ...] as in PEFT."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..config import DoraConfig
from ..ops.compose import Convolution, conv_branch
from .kind import ComputingLayer, Kind
from .layer import DoraLayer


class ConvKind(Kind):
    """How convolutions differ from the other kinds."""

    def multiplies(self, base: nn.Module, forward: object) -> bool:
        return forward is nn.Conv1d.forward or forward is nn.Conv2d.forward or forward is nn.Conv3d.forward

    def multiply(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return cast(Convolution, base)._conv_forward(x, weight, None)

    def low_rank(self, layer: ComputingLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return conv_branch(x, lora_A, lora_B, scaling, cast(Convolution, layer.get_base_layer()))

    def matrix(self, base: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def in_layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.view(cast(Convolution, base).weight.shape)

    def as_matrices(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
        groups = cast(Convolution, base).groups
        if groups > 1:
            # B reads the ranks of its group only
            lora_B = torch.block_diag(*lora_B.unflatten(0, (groups, -1)))
        return lora_A, lora_B

    def magnitude_shape(self, base: nn.Module, out_features: int) -> tuple[int, ...]:
        return (1, out_features, *(1 for _ in cast(Convolution, base).kernel_size))

    def per_channel(self, base: nn.Module, vector: Tensor) -> Tensor:
        # of batched and unbatched input alike
        return vector.view(-1, *(1 for _ in cast(Convolution, base).kernel_size))

    def merge_obstacle(self, base: nn.Module) -> str | None:
        layer = cast(Convolution, base)
        if layer.groups > 1:
            return f"A crosses its {layer.groups} groups, so the composed kernel is not a grouped one."
        if layer.padding_mode != "zeros":
            return f"its base pads with '{layer.padding_mode}' and the low-rank branch with zeros."
        return None


class _ConvNd(DoraLayer):
    kind: Kind = ConvKind()

    def update_layer(self, adapter_name: str, *, r: int, config: DoraConfig, **kwargs: object) -> None:
        base = cast(Convolution, self.get_base_layer())
        if r % base.groups:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                f"not target this specific layer. (module '{self.name}', rank_pattern sets the rank of one module)"
            )
        super().update_layer(adapter_name, r=r, config=config, **kwargs)  # type: ignore[arg-type]


class Conv1d(_ConvNd, nn.Module):
    """DoRA on nn.Conv1d."""

    peft_layer = lora.layer.Conv1d


class Conv2d(_ConvNd, nn.Module):
    """DoRA on nn.Conv2d."""

    peft_layer = lora.layer.Conv2d


class Conv3d(_ConvNd, nn.Module):
    """DoRA on nn.Conv3d."""

    peft_layer = lora.layer.Conv3d
