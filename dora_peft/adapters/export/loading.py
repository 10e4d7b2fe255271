"""Adapters loaded by PEFT over a base model, whatever format they are in."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from ...config import DoraConfig
from ..convert import CHANGES_BASE, read_checked
from ..formats import FORMATS, Base, Checkpoint, UnreadableError, format_of, write_files
from ..formats.source import CONFIG, Source
from .names import Names

_PREFIX = "base_model.model."


def loaded_over(model: nn.Module, sources: Sequence[Source], base: Base) -> PeftModel:
    """The adapters over the model on the meta device."""
    loaded: PeftModel | None = None
    names: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # said of the model on the meta device, which nobody uses
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # an error, of `_check_filled`
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
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
            _check_filled(loaded, source, base)
        assert loaded is not None
        loaded.base_model.set_adapter(names)  # type: ignore[operator]
        for parameter in loaded.parameters():
            if not parameter.is_meta:
                # PEFT leaves them at the file's addresses, and products differ in their last bits by alignment
                parameter.data = parameter.data.clone()
    return loaded.eval()


def inner(model: PeftModel) -> nn.Module:
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
    for path, module in inner(model).named_modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None and name in module.token_indices:
            key = f"{_PREFIX}{path}.trainable_tokens_delta"
            if key not in source.tensors:
                raise UnreadableError(f"'{source.path}' has no '{key}', which its {CONFIG} announces. Save it again.")
            module.trainable_tokens_delta[name] = nn.Parameter(source.tensors[key].clone(), requires_grad=False)


def base_weights(sources: Sequence[Source], checkpoint: Checkpoint, names: Names) -> dict[str, Tensor]:
    """The base's own parameters in the adapters' files, by name: tables beside adapted embeddings
    (`save_embedding_layers`), biases, modules trained in full.

    Raises:
        UnreadableError: The base has no such parameter, or one of another shape: the vocabulary was resized.
    """
    found: dict[str, Tensor] = {}
    for source in sources:
        for key, tensor in source.tensors.items():
            if not key.startswith(_PREFIX) or "lora_" in key or "trainable_tokens_" in key:
                continue
            name = plain_path(key.removeprefix(_PREFIX))
            shape = names.shape(name)
            if shape is None:
                raise UnreadableError(
                    f"'{source.path}' holds a '{name}', and '{checkpoint.name}' is of a class without one: "
                    f"{checkpoint.config.get('architectures')}. Load the base by the class that was trained "
                    "(AutoModelForSequenceClassification ...), save it, and name that folder."
                )
            if tuple(tensor.shape) != shape:
                raise UnreadableError(
                    f"'{source.path}' brings a '{name}' of {list(tensor.shape)}, and that of '{checkpoint.name}' is "
                    f"{list(shape)}: the vocabulary was resized in training. Resize the base's embeddings and save it "
                    "first."
                )
            found[name] = tensor
    return found


def _check_filled(model: PeftModel, source: Source, base: Base) -> None:
    """Whether the file had all that the adapter has over the base.

    Raises:
        UnreadableError: PEFT found none for a module, which it says by a warning alone.
    """
    for name, parameter in inner(model).named_parameters():
        if parameter.is_meta and ("lora_" in name or ".modules_to_save." in name):
            raise UnreadableError(
                f"'{source.path}' has nothing for '{name}' of '{base.name}': it was trained over a model of another "
                "class, whose modules have other paths. Load the base by that class (AutoModel ...), save it, and "
                "name that folder."
            )


def plain_path(path: str) -> str:
    """The path of a wrapped module as the base model has it."""
    wrappers = ("base_layer", "token_adapter", "original_module", "modules_to_save")
    return ".".join(part for part in path.split(".") if part not in wrappers)
