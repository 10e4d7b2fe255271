"""A base model's files with adapters over them, one module in memory at a time.

The model stands on the meta device, and PEFT loads the adapters over it, so that A, B, m, s, tied rows and the order of
several adapters are what they are in a loaded model. A module's W0 is brought in from the files while c and W' are
computed, by the functions that `merge_and_unload` calls.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ...config import DoraConfig
from ...layers import DoraLayer
from ...layers.merge import merged_weight, parts
from ..convert import CHANGES_BASE, read_checked
from ..formats import FORMATS, Base, Checkpoint, UnreadableError, format_of, read_source, write_files
from ..formats.base import skeleton
from ..formats.source import CONFIG, Source
from .names import Names
from .requantised import Quantised, recorded

# A, B, s and c [out] of each adapter, in the order in which they are active.
Parts = list[tuple[Tensor, Tensor, float, Tensor]]
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """What an adapter holds of a parameter besides factors and magnitudes.

    Attributes:
        value: The whole parameter, or its rows.
        rows: Which rows, [k]; None for all.
    """

    value: Tensor
    rows: Tensor | None = None

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
        self._base = Base(checkpoint, device)
        self.device = self._base.device
        model = skeleton(checkpoint.config)
        if model is None:
            raise UnreadableError(
                f"'{checkpoint.name}': its config.json names no model of transformers, whose modules say how weights "
                "are stored: expected 'architectures' with one. Merge with merge_and_unload in Python."
            )
        self.names = Names(checkpoint, model)
        self.sources = [read_source(adapter, allow_pickle=allow_pickle) for adapter in adapters]
        record, self.unrecorded = recorded(self.sources, base_quantization)
        self.quantised: Quantised | None = None
        if record is not None and "quantization_config" not in checkpoint.config:
            again = skeleton(checkpoint.config)
            assert again is not None
            self.quantised = Quantised(record, again)
        self._given = _base_weights(self.sources, checkpoint, self.names)
        self.model = _loaded(model, self.sources, self._base)
        self._adapters = list(self.model.peft_config)
        self.layers = {
            name: layer for name, layer in _inner(self.model).named_modules() if isinstance(layer, DoraLayer)
        }

    @property
    def configs(self) -> list[DoraConfig]:
        """Those of the adapters, in order."""
        return [cast(DoraConfig, self.model.peft_config[name]) for name in self._adapters]

    def over(self, model: nn.Module) -> PeftModel:
        """The adapters over the base in memory, active in their order."""
        return _loaded(model, self.sources, self._base)

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
        try:
            with torch.no_grad():
                yield layer
        finally:
            # a table that the adapter brought is not on the meta device either
            base.weight = nn.Parameter(away.to("meta"), requires_grad=False)

    def stored(self, path: str) -> Tensor:
        """W0 of a module as the model holds it, floats."""
        parameter = f"{path}.weight"
        weight = self._given[parameter] if parameter in self._given else self.names.read(parameter)
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise UnreadableError(
                f"'{self.checkpoint.name}' is quantised: the weight of '{path}' is {weight.dtype}. Name the base "
                "before quantisation."
            )
        return self.requantised(path, weight)

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
            try:
                found = merged_weight(layer, self.adapters_of(path), safe_merge=True).detach()
            except (NotImplementedError, ValueError) as error:
                raise UnreadableError(str(error)) from error
        return found.to(dtype or self.dtype_of(path))

    def dtype_of(self, path: str) -> torch.dtype:
        """That of a module's weight in the files; of a quantised one, that of what it stands for."""
        found = self.checkpoint.entries[self.names.keys(f"{path}.weight")[0]].dtype
        return (
            found if found is not None and found.is_floating_point and found.itemsize > 1 else self.stored(path).dtype
        )

    def trained(self) -> dict[str, Trained]:
        """What the adapters hold of other parameters, by their names in the base model: biases, whole modules, rows."""
        adapted = {f"{path}.weight" for path in self.layers}
        found = {name: Trained(tensor) for name, tensor in self._given.items() if name not in adapted}
        for path, module in _inner(self.model).named_modules():
            if isinstance(module, TrainableTokensLayer):
                if module.tied_adapter is None:
                    found.update(_tokens(path, module, self._adapters))
            elif isinstance(module, ModulesToSaveWrapper):
                for name in (one for one in self._adapters if one in module.modules_to_save):
                    saved = module.modules_to_save[name]
                    for own, tensor in [*saved.named_parameters(), *saved.named_buffers()]:
                        found[f"{path}.{own}"] = Trained(tensor.detach())
            elif ".modules_to_save" not in path and ".original_module" not in path:
                for own, parameter in module.named_parameters(recurse=False):
                    # those of the base stand on the meta device, unless the adapter trained them
                    if own == "bias" and not parameter.is_meta:
                        found[f"{_plain(path)}.{own}"] = Trained(parameter.detach())
        return found


def _loaded(model: nn.Module, sources: Sequence[Source], base: Base) -> PeftModel:
    """The adapters over the model on the meta device."""
    loaded: PeftModel | None = None
    names: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # said of the model on the meta device, which nobody uses
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        for number, source in enumerate(sources):
            folder = _as_folder(source, base, Path(scratch) / str(number))
            config = DoraConfig.from_pretrained(folder)
            name = "default" if loaded is None else f"adapter_{number}"
            try:
                if loaded is None:
                    loaded = PeftModel.from_pretrained(
                        model, folder, config=config, low_cpu_mem_usage=True, torch_device="cpu"
                    )
                else:
                    loaded.load_adapter(folder, name, config=config, low_cpu_mem_usage=True, torch_device="cpu")
            except (ValueError, RuntimeError, KeyError) as error:
                raise UnreadableError(f"'{source.path}' does not load over '{base.name}': {error}") from error
            names.append(name)
            _fill_tokens(loaded, source, name)
        assert loaded is not None
        for parameter in loaded.parameters():
            # what is mapped from a file may lie anywhere, a copy where a loaded model's would, which products feel
            parameter.data = parameter.data.clone()
        loaded.base_model.set_adapter(names)  # type: ignore[operator]
    return loaded.eval()


def _inner(model: PeftModel) -> nn.Module:
    """The base model with adapted layers in it."""
    return cast(nn.Module, model.base_model.model)


def _as_folder(source: Source, base: Base, scratch: Path) -> str:
    """The folder of an adapter in PEFT's format: its own, or one written for it."""
    name = format_of(source)
    read = read_checked(source, name, base, None)
    bare = [path for path, module in read.modules.items() if module.magnitude is None]
    if bare:
        raise UnreadableError(
            f"'{source.path}' is no DoRA: module '{bare[0]}' has no magnitude ({len(bare)} of {len(read.modules)}). A "
            "plain LoRA is served as it is."
        )
    init = (source.config or {}).get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        raise UnreadableError(
            f"'{source.path}' was initialised by {init[:20]!r}, which changes the base's weights whenever it is "
            "loaded. Save it with path_initial_model_for_weight_conversion first."
        )
    if (source.config or {}).get("layer_replication"):
        raise UnreadableError(
            f"'{source.path}' repeats layers of the base (layer_replication), which no exported model can hold once. "
            "Merge it with merge_and_unload."
        )
    if name == "peft" and source.path.name == "adapter_model.safetensors":
        return str(source.path.parent)
    write_files(FORMATS["peft"].write(read, base), scratch)
    return str(scratch)


def _fill_tokens(model: PeftModel, source: Source, name: str) -> None:
    """Trained rows of embeddings, which PEFT 0.21.2 does not load over a table on the meta device."""
    for path, module in _inner(model).named_modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None and name in module.token_indices:
            key = f"{_PREFIX}{path}.trainable_tokens_delta"
            if key not in source.tensors:
                raise UnreadableError(f"'{source.path}' has no '{key}', which its {CONFIG} announces. Save it again.")
            module.trainable_tokens_delta[name] = nn.Parameter(source.tensors[key].clone(), requires_grad=False)


def _base_weights(sources: Sequence[Source], checkpoint: Checkpoint, names: Names) -> dict[str, Tensor]:
    """The base's own tables that PEFT saves along with adapted embeddings (`save_embedding_layers`), by parameter.

    Raises:
        UnreadableError: One has another shape than in the files: the vocabulary was resized.
    """
    found: dict[str, Tensor] = {}
    for source in sources:
        for key, tensor in source.tensors.items():
            name = _plain(key.removeprefix(_PREFIX))
            if not key.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight")) or "lora_" in key:
                continue
            (stored,) = names.keys(name)
            if tuple(tensor.shape) != checkpoint.entries[stored].shape:
                raise UnreadableError(
                    f"'{source.path}' brings a '{name}' of {list(tensor.shape)}, and that of '{checkpoint.name}' is "
                    f"{list(checkpoint.entries[stored].shape)}: the vocabulary was resized in training. Resize the "
                    "base's embeddings and save it first."
                )
            found[name] = tensor
    return found


def _tokens(path: str, module: TrainableTokensLayer, adapters: list[str]) -> dict[str, Trained]:
    names = [name for name in adapters if name in module.token_indices]
    if not names:
        return {}
    rows = torch.tensor([row for name in names for row in module.token_indices[name]])
    value = torch.cat([module.trainable_tokens_delta[name].detach() for name in names])
    return {f"{_plain(path)}.weight": Trained(value, rows)}


def _plain(path: str) -> str:
    """The path of a wrapped module as the base model has it."""
    wrappers = ("base_layer", "token_adapter", "original_module")
    return ".".join(part for part in path.split(".") if part not in wrappers)


def kernel_of(base: nn.Module) -> tuple[int, ...]:
    """(in_channels / groups, kernel sizes ...) of a convolution; () of other layers."""
    return tuple(base.get_parameter("weight").shape[1:]) if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
