"""Weights that bitsandbytes quantised: int8, and 4-bit in its nf4 and fp4 forms.

bitsandbytes itself is imported only if there is such a weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .base import BaseWeight, FourBit

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit


class Bnb8bit(BaseWeight):
    """bitsandbytes int8: a row is CB[row] * SCB[row] / 127."""

    copies = True

    def __init__(self, layer: Linear8bitLt, weight: Int8Params) -> None:
        self.layer, self.weight, self.data = layer, weight, weight.data
        # the first forward moves SCB from the parameter to the layer's state
        scb = cast(Tensor, layer.state.SCB if weight.SCB is None else weight.SCB)
        self.row_scale = scb.to(torch.float32) / 127
        out_features, in_features = weight.shape
        super().__init__(out_features, in_features, torch.float32, weight.device)

    def block(self, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        shape = stop - start, self.in_features
        out = torch.empty(shape, dtype=self.dtype, device=self.device) if memory is None else memory[: math.prod(shape)]
        return out.view(shape).copy_(self.data[start:stop]).mul_(self.row_scale[start:stop, None].to(self.device))

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> nn.Parameter:
        dense = torch.cat([rows(block, start, stop).half().cpu() for start, stop, block in self.blocks()])
        new = type(self.weight)(dense, requires_grad=False, has_fp16_weights=self.layer.state.has_fp16_weights)
        return cast(nn.Parameter, cast(Tensor, new).to(self.device))

    def keep_original(self, layer: nn.Module, offload: bool) -> nn.Parameter:
        original, state = cast("Int8Params", layer.weight), cast("Linear8bitLt", layer).state
        # the first forward has moved both to the layer's state, where those of the merged weight will be
        original.CB, original.SCB = original.data, state.SCB if original.SCB is None else original.SCB
        return original

    def install(self, layer: nn.Module, weight: nn.Parameter) -> None:
        layer.weight = weight
        state = cast("Linear8bitLt", layer).state
        # the next forward takes both from the parameter
        state.CB = state.SCB = None


class Bnb4bit(BaseWeight):
    """bitsandbytes nf4 or fp4.

    Quantisation blocks run along the flattened weight. A block of rows is dequantised with the rows before and after it
    up to borders of quantisation blocks, which for some widths is the whole weight.
    """

    def __init__(self, layer: Linear4bit, weight: Params4bit) -> None:
        self.layer, self.weight = layer, weight
        self.data, self.state = _unpacked(weight)
        out_features, in_features = self.state.shape
        super().__init__(out_features, in_features, torch.float32, weight.device)
        # the least number of rows that fills whole quantisation blocks
        self.align = self.state.blocksize // math.gcd(self.state.blocksize, self.in_features)
        self.block_rows = max(self.align, self.block_rows // self.align * self.align)
        self._absmax: Tensor | None = None

    def block(self, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        # bitsandbytes allocates what it gives
        first = start // self.align * self.align
        last = min(-(-stop // self.align) * self.align, self.out_features)
        return self._dequantize(first, last)[start - first : stop - first]

    def stored(self) -> FourBit:
        state = self.state
        packed = self.data.view(torch.uint8).flatten()
        return FourBit(packed, self._statistics().float(), state.code, state.blocksize, state.dtype, tuple(state.shape))

    def _statistics(self) -> Tensor:
        """The largest absolute value of each quantisation block."""
        import bitsandbytes.functional as bnb

        if self._absmax is None:
            self._absmax = self.state.absmax
            if self.state.nested:
                self._absmax = bnb.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset
        return self._absmax

    def _dequantize(self, start: int, stop: int) -> Tensor:
        import bitsandbytes.functional as bnb

        state, n = self.state, self.in_features
        packed = self.data.view(torch.uint8).flatten()[start * n // 2 : -(-stop * n // 2)]
        part = bnb.QuantState(
            absmax=self._statistics()[start * n // state.blocksize : -(-stop * n // state.blocksize)].float(),
            shape=torch.Size((stop - start, n)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return bnb.dequantize_4bit(packed[:, None], part).to(self.dtype)

    def replacement(self, rows: Callable[[Tensor, int, int], Tensor]) -> nn.Parameter:
        parts = [rows(block, start, stop).to(self.state.dtype).cpu() for start, stop, block in self.blocks()]
        weight = self.weight
        new = type(weight)(
            torch.cat(parts),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=self.layer,
        )
        return cast(nn.Parameter, cast(Tensor, new).to(self.device))


def quantised(layer: nn.Module, weight: object) -> BaseWeight | None:
    """The seam to a weight that bitsandbytes has quantised, None for any other.

    Args:
        layer: The base layer.
        weight: Its weight, or the one that stands in for it.
    """
    # by name: bitsandbytes may not be installed
    kind = type(weight).__name__
    if kind == "Params4bit" and cast("Params4bit", weight).quant_state is not None:
        return Bnb4bit(cast("Linear4bit", layer), cast("Params4bit", weight))
    if kind == "Int8Params" and cast(Tensor, weight).dtype == torch.int8:
        return Bnb8bit(cast("Linear8bitLt", layer), cast("Int8Params", weight))
    return None


def unpack_for_gradient(layer: nn.Module, x: Tensor, training: bool) -> None:
    """Undo bitsandbytes' repacking for evaluation before a call that needs a gradient.

    Its product of a packed weight has none for x, and says so only if the layer has a bias. Evaluation mode alone does
    not mean that none is asked for.

    Args:
        layer: Any base layer.
        x: Its input.
        training: Whether the adapted layer is in training mode.
    """
    if not training and not (x.requires_grad and torch.is_grad_enabled()):
        return
    weight = getattr(layer, "weight", None)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        packed = cast("Params4bit", weight)
        packed.data, packed.quant_state = _unpacked(packed)


def _unpacked(weight: Params4bit) -> tuple[Tensor, QuantState]:
    """Data and quantisation state of a 4-bit weight in row order.

    An evaluation on a CPU with AVX512-BF16 repacks both in place (bitsandbytes >= 0.49), with fp32 statistics as bf16.
    """
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # the inverse writes into the state, and leaves the statistics transposed
    state = copy.copy(weight.quant_state)
    absmax = state.absmax.T.reshape(-1).float()
    data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax, state.nested = absmax, False
    return data, state
