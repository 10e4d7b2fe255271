"""Patches of PeftModel: creating, loading, saving or switching a DoRA adapter succeeds, or else changes nothing."""

from __future__ import annotations

import inspect
import os
import pickle
import shutil
from typing import cast

import peft.peft_model
import peft.utils.hotswap
import peft.utils.save_and_load
import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn

from .._files import saving, staged_directory
from .._own_entries import MARKER, ROW_RECORDS
from ..adapters import card
from ..adapters.undo import restored_on_failure, switched
from ..config import DoraConfig
from ..layers import DoraLayer
from .configs import into_dora, read_config
from .patching import Function, patch

Path = str | os.PathLike[str]


# What torch says of an intact file that is asked for on a device that is not there.
_OF_DEVICES = ("CUDA", "deserialize object on")
# What torch.load raises for files that are damaged, or that hold something else.
_DAMAGED = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, AttributeError)


class UnreadableAdapterError(ValueError, SafetensorError):
    """An adapter file is truncated or not a safetensors file."""


class UnreadablePickleError(ValueError, RuntimeError, pickle.UnpicklingError):
    """An adapter file that was made by torch.save is damaged, or holds other things than tensors."""


class AdapterShapeError(ValueError, RuntimeError):
    """An adapter's tensors have other shapes than the model's."""


def install() -> None:
    """Patch PeftModel and PEFT's reader of adapter files."""
    patch(PeftModel, "__init__", _init)
    patch(PeftModel, "from_pretrained", _from_pretrained)
    patch(PeftModel, "load_adapter", _load_adapter)
    patch(PeftModel, "add_adapter", _add_adapter)
    patch(PeftModel, "set_adapter", _set_adapter)
    patch(PeftModel, "save_pretrained", _save_pretrained)
    patch(PeftModel, "_upload_modified_files", _upload_modified_files)
    # by all names under which PEFT's own functions call it
    for module in (peft.peft_model, peft.utils.save_and_load, peft.utils.hotswap):
        patch(module, "load_peft_weights", _load_peft_weights)
    patch(peft.utils.save_and_load, "torch_load", _torch_load)


def shape_error(error: RuntimeError, model_id: object) -> AdapterShapeError | None:
    """What to say of torch's error about tensors of other shapes; None for another error."""
    if not any(words in str(error) for words in ("size mismatch", "mismatched_sizes")):
        return None
    return AdapterShapeError(
        f"The adapter in '{model_id}' does not fit the model: {error}\nIt was trained on another base model, or "
        "saved with another rank than its config says. Load it on its own base model, or pass "
        "ignore_mismatched_sizes=True to skip these tensors."
    )


def _is_dora(model: PeftModel) -> bool:
    return getattr(model, "peft_type", None) == "DORA"


def _init(original: Function) -> Function:
    def __init__(self: PeftModel, model: nn.Module, peft_config: PeftConfig, *args: object, **kwargs: object) -> object:
        if not isinstance(peft_config, DoraConfig):
            return original(self, model, peft_config, *args, **kwargs)
        with restored_on_failure(model):
            return original(self, model, peft_config, *args, **kwargs)

    return __init__


def _from_pretrained(original: Function) -> Function:
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: object, **kwargs: object) -> object:
        def concerned() -> bool:
            # Before there are any, nothing has been changed that is ours.
            return any(isinstance(module, DoraLayer) for module in model.modules())

        with restored_on_failure(model, concerned=concerned):
            return original(cls, model, *args, **kwargs)

    return from_pretrained


def _load_adapter(original: Function) -> Function:
    def load_adapter(self: PeftModel, model_id: Path, adapter_name: str, *args: object, **kwargs: object) -> object:
        if not _is_dora(self):
            return original(self, model_id, adapter_name, *args, **kwargs)
        token = into_dora.set(True)
        try:
            with restored_on_failure(self, adapter_name):
                if adapter_name in self.peft_config:
                    _adopt_row_records(self.peft_config[adapter_name], model_id, kwargs)
                return original(self, model_id, adapter_name, *args, **kwargs)
        except RuntimeError as error:
            clearer = shape_error(error, model_id)
            if clearer is None:
                raise
            raise clearer from error
        finally:
            into_dora.reset(token)

    return load_adapter


def _adopt_row_records(config: PeftConfig, model_id: Path, kwargs: dict[str, object]) -> None:
    """Read which rows are tied from a folder whose config is not read otherwise: its adapter exists already."""
    # Otherwise it has just been read from the Hub together with the rest of the config.
    if getattr(config, ROW_RECORDS[0]) is not None and not os.path.isdir(model_id):
        return
    hub, _ = PeftModel._split_kwargs(dict(kwargs))
    try:
        mapping = read_config(str(model_id), **hub).get("auto_mapping")
    except (OSError, ValueError):
        # PEFT does without the file here.
        mapping = None
    own = mapping.get(MARKER) if isinstance(mapping, dict) else None
    for name in ROW_RECORDS:
        setattr(config, name, (own or {}).get(name))


def _add_adapter(original: Function) -> Function:
    def add_adapter(
        self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: object, **kwargs: object
    ) -> object:
        kinds = {str(self.peft_type), str(peft_config.peft_type)}
        if self.peft_type != peft_config.peft_type and "PeftType.DORA" in kinds:
            raise ValueError(
                "Cannot combine adapters with different peft types. Found "
                f"{self.peft_type} (adapters {', '.join(self.peft_config)}) and {peft_config.peft_type} (adapter "
                f"'{adapter_name}'). Merge the first with merge_and_unload() before adding the second, or load a "
                "use_dora adapter of PEFT's with dora_peft.DoraConfig.from_pretrained."
            )
        if not _is_dora(self):
            return original(self, adapter_name, peft_config, *args, **kwargs)
        with restored_on_failure(self):
            return original(self, adapter_name, peft_config, *args, **kwargs)

    return add_adapter


def _set_adapter(original: Function) -> Function:
    def set_adapter(self: PeftModel, *args: object, **kwargs: object) -> object:
        if not _is_dora(self):
            return original(self, *args, **kwargs)
        with restored_on_failure(self, modules=switched(self)):
            return original(self, *args, **kwargs)

    return set_adapter


def _load_peft_weights(original: Function) -> Function:
    def load_peft_weights(model_id: str, *args: object, subfolder: str | None = None, **kwargs: object) -> object:
        folder = os.path.join(model_id, subfolder or "")
        names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        if os.path.isdir(folder) and not any(os.path.exists(os.path.join(folder, name)) for name in names):
            raise ValueError(
                f"No {names[0]} or {names[1]} in '{folder}', found {sorted(os.listdir(folder))[:5]}. Save the "
                "adapter again, or download it completely."
            )
        if subfolder is not None:
            kwargs["subfolder"] = subfolder
        try:
            return original(model_id, *args, **kwargs)
        except SafetensorError as error:
            raise unreadable(error, model_id) from error

    return load_peft_weights


def unreadable(error: SafetensorError, model_id: object) -> UnreadableAdapterError:
    """What to say of safetensors' error, which names neither file nor cure."""
    return UnreadableAdapterError(
        f"Cannot read {SAFETENSORS_WEIGHTS_NAME} of '{model_id}': {error}. The file is truncated or not a safetensors "
        "file; save or download the adapter again."
    )


def _torch_load(original: Function) -> Function:
    def torch_load(file: object, *args: object, **kwargs: object) -> object:
        try:
            found = original(file, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except _DAMAGED as error:
            if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_DEVICES):
                raise
            # torch's words fill a page, and advise to run what the file holds
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            known = [line for line in lines if line.startswith(("Unsupported", "Trying to", "GLOBAL", "Can only"))]
            said = known[0] if known else "" if isinstance(error, pickle.UnpicklingError) else "".join(lines[:1])
            raise _no_tensors(file, f"{type(error).__name__}: {said}".rstrip(": .")) from error
        # of adapters of other kinds PEFT decides
        ours = not isinstance(found, dict) or any("lora_" in str(name) for name in found)
        if ours and not (isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())):
            raise _no_tensors(file, f"found {str(found)[:60]!r}")
        return found

    return torch_load


def _no_tensors(file: object, found: str) -> UnreadablePickleError:
    return UnreadablePickleError(
        f"Cannot read the adapter's tensors from '{file}' ({found}). The file is damaged, or holds other things than "
        "tensors, which are not unpickled because that runs their code. Save the adapter again where it was made, as "
        "safetensors (save_pretrained's default), or download it again."
    )


def _save_pretrained(original: Function) -> Function:
    signature = inspect.signature(original)

    def save_pretrained(self: PeftModel, *args: object, **kwargs: object) -> object:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if not _is_dora(self) or not bound.arguments["is_main_process"]:
            return original(self, *args, **kwargs)
        target = str(bound.arguments["save_directory"])
        if os.path.isfile(target):
            raise ValueError(f"Provided path ({target}) should be a directory, not a file")
        with saving("the adapter", target), restored_on_failure(self), staged_directory(target) as staging:
            if os.path.exists(os.path.join(target, "README.md")):
                shutil.copy2(os.path.join(target, "README.md"), staging)
            bound.arguments["save_directory"] = staging
            original(*bound.args, **bound.kwargs)
            selected = bound.arguments["selected_adapters"] or [self.active_adapter]
            name = self.active_adapter if self.active_adapter in selected else selected[0]
            card.complete_model_card(staging, cast(DoraConfig, self.peft_config[name]))
        return None

    return save_pretrained


def _upload_modified_files(original: Function) -> Function:
    def _upload_modified_files(
        self: PeftModel, working_dir: Path, repo_id: str, *args: object, **kwargs: object
    ) -> object:
        if _is_dora(self):
            card.remove_generic_card(str(working_dir))
            self.create_or_update_model_card(str(working_dir))
            card.complete_model_card(str(working_dir), cast(DoraConfig, self.active_peft_config), repo_id)
        return original(self, working_dir, repo_id, *args, **kwargs)

    return _upload_modified_files
