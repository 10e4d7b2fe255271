"""Weights whose library can only dequantise all of them: HQQ's and torchao's."""

from __future__ import annotations

from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .dense import Dense


class Dequantized(Dense):
    """The dense weight of one layer, dequantised when the seam is asked for and let go with it; nothing is written."""

    mergeable = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(dequantize_module_weight(layer), lambda w: w)
