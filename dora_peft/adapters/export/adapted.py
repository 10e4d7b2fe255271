"""A base model's files with adapters over them, one module in memory at a time.

The model stands on the meta device, and PEFT loads the adapters over it, so that A, B, m, s, tied rows and the order of
several adapters are what they are in a loaded model. A module's W0 is brought in from the files while c and W' are
computed, by the functions that `merge_and_unload` calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ... import norms
from ...bases.inspection import FLOATS
from ...config import DoraConfig
from ...layers import DoraLayer
from ...layers.merge import merged_weight, parts
from ..formats import Base, Checkpoint, UnreadableError, read_source
from ..formats.base import skeleton
from .codes import Codes, codes_of, quantised_paths
from .loading import base_weights, inner, loaded_over, plain_path
from .names import Names
from .requantised import Quantised, recorded

# A, B, s and c [out] of each adapter, in the order in which they are active.
Parts = list[tuple[Tensor, Tensor, float, Tensor]]


@dataclass(frozen=True)
class Trained:
    """What an adapter holds of a parameter besides factors and magnitudes.

    Attributes:
        value: The whole parameter, or its rows.
        rows: Which rows, [k]; None for all.
        alone: Whether PEFT keeps a copy for it (`modules_to_save`); what it writes into the base's own parameter is
            seen by all that are tied to that.
    """

    value: Tensor
    rows: Tensor | None = None
    alone: bool = False

    def over(self, stored: Tensor) -> Tensor:
        """The parameter with what was trained, in the dtype of the stored one."""
        if self.rows is None:
            return self.value.to(stored.dtype)
        out = stored.clone()
        out[self.rows] = self.value.to(stored.dtype)
        return out


class AdaptedBase:
    """A base model's files and the adapters over them.

    Args:
        checkpoint: The base's files.
        adapters: Folders, files or names on the Hub, in any format, in the order in which they are active.
        device: Where W0 is brought and W' computed.
        allow_pickle: See `convert`.
        base_quantization: How the base was quantised in training, one of `requantised.NAMED`; what the folders
            say if None.

    Attributes:
        layers: The adapted modules by their paths in the base model.
        names: The parameters of the base model in its files.
        sources: What was read of each adapter.
        quantised: What bitsandbytes makes of the base, if the adapters were trained over that.
        coded: The modules whose weights are quantised in the files, and what the files call them.
        base: The same files by the modules' paths.
        record: How the base was quantised in training, as the folders or the caller say; None for not at all.
        told: Whether the caller says how the base was quantised in training.
        unrecorded: Whether no folder says how its base was quantised, and nobody else.

    Raises:
        UnreadableError: One cannot be read, does not fit the base, is no DoRA, or changes the base when loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[str | os.PathLike[str]],
        *,
        device: torch.device | str = "cpu",
        allow_pickle: bool = False,
        base_quantization: str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.base = Base(checkpoint, device)
        self.device = self.base.device
        model = skeleton(checkpoint.config)
        if model is None:
            raise UnreadableError(
                f"'{checkpoint.name}': its config.json names no model of transformers, whose modules say how weights "
                "are stored: expected 'architectures' with one. Merge with merge_and_unload in Python."
            )
        self.names = Names(checkpoint, model)
        self.sources = [read_source(adapter, allow_pickle=allow_pickle) for adapter in adapters]
        self.told = base_quantization is not None
        self.record, self.unrecorded = recorded(self.sources, base_quantization)
        self.quantised: Quantised | None = None
        if self.record is not None and not checkpoint.is_quantised:
            again = skeleton(checkpoint.config)
            assert again is not None
            self.quantised = Quantised(self.record, again)
        self.coded, self._turned = _coded(checkpoint, self.names, model)
        self._given = base_weights(self.sources, checkpoint, self.names)
        self.model = loaded_over(model, self.sources, self.base)
        self._adapters = list(self.model.peft_config)
        self.layers = {name: layer for name, layer in inner(self.model).named_modules() if isinstance(layer, DoraLayer)}

    @property
    def configs(self) -> list[DoraConfig]:
        """Those of the adapters, in order."""
        return [cast(DoraConfig, self.model.peft_config[name]) for name in self._adapters]

    def over(self, model: nn.Module) -> PeftModel:
        """The adapters over the base in memory, active in their order."""
        return loaded_over(model, self.sources, self.base)

    def adapters_of(self, path: str) -> list[str]:
        """The adapters that change a module, in order."""
        layer = self.layers[path]
        return [name for name in self._adapters if name in layer.scaling]

    @contextmanager
    def at_hand(self, path: str, dtype: torch.dtype | None = None) -> Iterator[DoraLayer]:
        """An adapted module with its W0 in memory, in another dtype if one is given."""
        layer = self.layers[path]
        base = layer.get_base_layer()
        away = base.get_parameter("weight")
        weight = self.stored(path)
        if weight.shape != away.shape:
            raise UnreadableError(
                f"'{self.checkpoint.name}' is another base: module '{path}' has a weight of {list(weight.shape)} in "
                f"its files, and {list(away.shape)} by its config."
            )
        # a copy lies where a loaded model's weight would, which may decide the last bit of a product
        base.weight = nn.Parameter(weight.to(self.device, dtype, copy=True), requires_grad=False)
        # the file's memory
        del weight
        try:
            with torch.no_grad():
                yield layer
        finally:
            # a table that the adapter brought is not on the meta device either
            base.weight = nn.Parameter(away.to("meta"), requires_grad=False)
            # small records between large tensors keep the heap from shrinking: 170 MiB for each 20 modules
            norms.forget(layer)

    def stored(self, path: str) -> Tensor:
        """W0 of a module as the model holds it, floats."""
        codes = self.codes(path)
        if codes is not None:
            return self.in_layout(path, codes.dequantise(0, codes.out_features))
        parameter = f"{path}.weight"
        weight = self._given[parameter] if parameter in self._given else self.names.read(parameter)
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise UnreadableError(
                f"'{self.checkpoint.name}' is quantised: the weight of '{path}' is {weight.dtype}. Name the base "
                "before quantisation."
            )
        return self.requantised(path, weight)

    def codes(self, path: str) -> Codes | None:
        """The quantised weight of a module, if it is one."""
        return codes_of(self.checkpoint, self.coded[path]) if path in self.coded else None

    def in_layout(self, path: str, matrix: Tensor) -> Tensor:
        """Rows [out, in] of a module that is quantised, as the module would hold them in floating point."""
        return matrix.t().contiguous() if path in self._turned else matrix

    def requantised(self, path: str, weight: Tensor) -> Tensor:
        """A module's weight after quantising, if the adapters were trained over that."""
        if self.quantised is None or path not in self.quantised.paths:
            return weight
        return self.quantised.rounded(path, weight.to(self.device))

    def parts(self, path: str, layer: DoraLayer) -> Parts:
        """A, B, s and c of each adapter of a module that is at hand."""
        return parts(layer, self.adapters_of(path), layer.base_weight())

    def merged(self, path: str, dtype: torch.dtype | None = None) -> Tensor:
        """W' of a module in its own layout, as merging makes it of W0 in its own or another dtype.

        Raises:
            UnreadableError: It cannot be merged.
        """
        with self.at_hand(path, dtype) as layer:
            return self.merge(path, layer).to(dtype or self.dtype_of(path))

    def merge(self, path: str, layer: DoraLayer) -> Tensor:
        """W' of a module that is at hand, in the dtype of W0.

        Raises:
            UnreadableError: It cannot be merged.
        """
        try:
            return merged_weight(layer, self.adapters_of(path), safe_merge=True).detach()
        except (NotImplementedError, ValueError) as error:
            raise UnreadableError(str(error)) from error

    def dtype_of(self, path: str) -> torch.dtype:
        """That of a module's weight in the files; of a quantised one, that of the model."""
        codes = self.codes(path)
        if codes is not None:
            said = self.checkpoint.config.get("dtype", self.checkpoint.config.get("torch_dtype"))
            return next((one for one in FLOATS if str(one) == f"torch.{said}"), codes.dtype)
        found = self.checkpoint.entries[self.names.keys(f"{path}.weight")[0]].dtype
        return found if found is not None and found in FLOATS else self.stored(path).dtype

    def given(self) -> list[str]:
        """The base's own tables that an adapter brings along."""
        return list(self._given)

    def replaced(self) -> list[str]:
        """The base's own tables that an adapter brings along, and whose values are others than in the files."""

        def differs(name: str, brought: Tensor) -> bool:
            stored = self.names.read(name)
            # training in 16 bits rounds those of fp32
            dtype = min((stored.dtype, brought.dtype), key=lambda one: one.itemsize)
            return not torch.equal(stored.to(dtype), brought.to(dtype))

        return [name for name, tensor in self._given.items() if differs(name, tensor)]

    def trained(self) -> dict[str, Trained]:
        """What the adapters hold of other parameters, by their names in the base model: biases, whole modules, rows."""
        adapted = {f"{path}.weight" for path in self.layers}
        found = {name: Trained(tensor) for name, tensor in self._given.items() if name not in adapted}
        for path, module in inner(self.model).named_modules():
            if isinstance(module, TrainableTokensLayer):
                if module.tied_adapter is None:
                    found.update(_tokens(path, module, self._adapters))
            elif isinstance(module, ModulesToSaveWrapper):
                for name in (one for one in self._adapters if one in module.modules_to_save):
                    saved = module.modules_to_save[name]
                    for own, tensor in [*saved.named_parameters(), *saved.named_buffers()]:
                        found[f"{path}.{own}"] = Trained(tensor.detach(), alone=True)
        return found


def _coded(checkpoint: Checkpoint, names: Names, model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """The modules whose weights are quantised, by what the files call them, and which of them are Conv1D."""
    if not checkpoint.is_quantised:
        return {}, set()
    coded = {names.module_of(path): path for path in quantised_paths(checkpoint)}
    return coded, {path for path in coded if isinstance(model.get_submodule(path), Conv1D)}


def _tokens(path: str, module: TrainableTokensLayer, adapters: list[str]) -> dict[str, Trained]:
    names = [name for name in adapters if name in module.token_indices]
    if not names:
        return {}
    rows = torch.tensor([row for name in names for row in module.token_indices[name]])
    value = torch.cat([module.trainable_tokens_delta[name].detach() for name in names])
    return {f"{plain_path(path)}.weight": Trained(value, rows)}


def kernel_of(base: nn.Module) -> tuple[int, ...]:
    """(in_channels / groups, kernel sizes ...) of a convolution; () of other layers."""
    return tuple(base.get_parameter("weight").shape[1:]) if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
