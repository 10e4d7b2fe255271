"""Weights stored as floating point numbers: dense, transposed, flattened, and those of grouped convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from . import scratch
from .base import BaseWeight


class Dense(BaseWeight):
    """A float tensor seen through `view`, which gives its [out, in] matrix without copying, but for a kernel in
    channels_last: its rows are gathered block by block."""

    def __init__(self, weight: Tensor, view: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.view = weight.detach(), view
        acc_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.gathers = weight.dim() > 2 and not weight.is_contiguous()
        out_features, in_features = (
            (weight.shape[0], math.prod(weight.shape[1:])) if self.gathers else self.matrix.shape
        )
        super().__init__(out_features, in_features, acc_dtype, weight.device)
        self.has_blocks = self.gathers or self.matrix.is_contiguous()
        casts = weight.dtype != acc_dtype
        # another class of tensors may not be copied from as it is cast
        self.copies = (casts or self.gathers) and type(self.weight) is Tensor
        if not casts and not self.gathers:
            self.block_rows = max(1, self.out_features)

    @cached_property
    def matrix(self) -> Tensor:
        """W0 [out, in] as stored; a copy if the weight `gathers`."""
        return self.view(self.weight)

    def stored(self) -> Tensor | None:
        return self.matrix

    def block(self, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        part = self.weight[start:stop] if self.gathers else self.matrix[start:stop]
        if memory is None or not self.copies:
            return part.flatten(1).to(self.dtype)
        if self.gathers:
            return self._contiguous(start, stop, memory)
        out = scratch.like(part, memory)
        out.copy_(part)
        return out

    def _contiguous(self, start: int, stop: int, memory: Tensor) -> Tensor:
        """Rows start:stop at the start of `memory`, next to each other whatever the weight's strides."""
        out = memory[: (stop - start) * self.row_elements].view(stop - start, self.row_elements)
        if self.gathers:
            part = self.weight[start:stop]
            out.view(part.shape).copy_(part)
        else:
            out.copy_(self.matrix[start:stop])
        return out

    def rows(self, index: Tensor) -> Tensor:
        return (self.weight[index].flatten(1) if self.gathers else self.matrix[index]).to(self.dtype)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> nn.Parameter:
        new = torch.empty_like(self.weight)
        size = min(self.dense_rows, self.out_features) * self.row_elements
        with scratch.lent(size, self.dtype, self.device) as memory:
            for start in range(0, self.out_features, self.dense_rows):
                stop = min(start + self.dense_rows, self.out_features)
                part = rows(self._contiguous(start, stop, memory), start, stop)
                # flattening a channels_last kernel would copy it
                if new.dim() > 2:
                    new[start:stop] = part.view(new[start:stop].shape)
                else:
                    self.view(new)[start:stop] = part
        return nn.Parameter(new, requires_grad=False)

    def keep_original(self, layer: nn.Module, offload: bool) -> nn.Parameter:
        original = layer.get_parameter("weight")
        if offload:
            original.data = original.data.cpu()
        return original

    def restore(self, layer: nn.Module, original: nn.Parameter) -> None:
        # the model may have been moved or cast in between, which reached the installed weight alone
        installed = layer.get_parameter("weight")
        original.data = original.data.to(device=installed.device, dtype=installed.dtype)
        self.install(layer, original)


class GroupedConv(Dense):
    """A grouped convolution: row o reads the channels of its group only, while A crosses all groups.

    The composed kernel is [out, in_channels, *kernel], block-diagonal in W0; `in` here is that of the composed kernel.
    It is not the kernel of a grouped convolution, so nothing can be merged.
    """

    mergeable = False

    def __init__(self, weight: Tensor, groups: int) -> None:
        super().__init__(weight, lambda w: w.flatten(1))
        self.groups, self.has_blocks = groups, False
        self.in_features *= groups
        self.dense_rows = max(1, self.dense_rows // groups)

    def stored(self) -> Tensor | None:
        return None

    def dense(self) -> Tensor:
        return self.rows(torch.arange(self.out_features, device=self.device))

    def _per_group(self, tensor: Tensor) -> Tensor:
        """[out, k] -> [groups, out / groups, k]."""
        return tensor.unflatten(0, (self.groups, -1))

    def rows(self, index: Tensor) -> Tensor:
        dense = torch.zeros(len(index), self.groups, self.matrix.shape[1], dtype=self.dtype, device=self.device)
        group = index // (self.out_features // self.groups)
        dense[torch.arange(len(index), device=index.device), group] = super().rows(index)
        return dense.flatten(1)

    def times(self, lora_A: Tensor) -> Tensor:
        # [groups, r, in / groups]
        A = lora_A.unflatten(1, (self.groups, -1)).transpose(0, 1)
        return torch.bmm(self._per_group(self.matrix.to(self.dtype)), A.transpose(1, 2)).flatten(0, 1)

    def vjp(self, grad: Tensor) -> Tensor:
        per_group = torch.bmm(self._per_group(grad).transpose(1, 2), self._per_group(self.matrix.to(self.dtype)))
        # [r, groups, in / groups] -> [r, in]
        return per_group.transpose(0, 1).flatten(1)
