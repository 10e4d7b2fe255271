"""Plugging a tuner into PEFT. Every workaround for an internal of PEFT or transformers lives here, with its reason.

Written against PEFT 0.20.0 to 0.21.2 and transformers 5.23. Each patch acts on DoRA models or marked folders only.

1. `PeftType` has no plugin hook: a member is added to the enum. A plain string would not do, transformers reads
   `.value`.
2. A folder of ours says `peft_type: LORA`, so that plain PEFT reads it. PEFT picks the config class by that entry, in
   `_get_peft_type` and `from_peft_type`; both are taught to see the mark in auto_mapping.
3. `PeftModel.save_pretrained` writes its files in place: for DoRA they go to a temporary directory first, and the model
   card is completed. `push_to_hub` (transformers 5.23) overwrites that card with a generic one: it is made again.
4. `PeftModel.load_adapter` and `from_pretrained` leave a half-loaded adapter behind an error: it is taken out again.
5. `PeftModel.add_adapter` refuses another kind of adapter without saying what to do.
6. `load_peft_weights` passes on safetensors' error about a damaged file, which names neither file nor cure.
7. transformers' `load_adapter` reads the file by itself: the checks and conversions of a DoRA checkpoint follow it.
8. PEFT 0.20 has no per-tuner hooks for the state dict: its two functions are wrapped.
9. `peft.helpers.rescale_adapter_scale` looks for LoraLayer alone.
10. accelerate's hooks put every module's tensors on the meta device between calls, and bring them in around its own
   forward pass. An adapter's are read without one, so they stay (offload.py).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import accelerate.hooks
import peft.helpers
import peft.utils.save_and_load
from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .._files import staged_directory
from ..bases.offload import staying_add_hook

# set while an adapter is loaded into a model that already is DoRA: PEFT's own use_dora folders are then taken as DoRA
_into_dora: ContextVar[bool] = ContextVar("into_dora", default=False)


class UnreadableAdapterError(ValueError, SafetensorError):
    """An adapter file is truncated or not a safetensors file."""


class AdapterShapeError(ValueError, RuntimeError):
    """An adapter's tensors have other shapes than the model's."""


# ---- 1. the enum


def add_peft_type(name: str = "DORA") -> None:
    """Add a member to `peft.PeftType`, once."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # some releases of Python 3.13
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)


def register(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """Enter config and tuner into PEFT's mappings and install the patches; importing twice changes nothing."""
    dora = PeftType.DORA  # type: ignore[attr-defined]
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(dora)
    if known is not None and known.__module__ != config_cls.__module__:
        raise ImportError(
            f"PeftType.DORA is already taken by {known.__module__}.{known.__name__}. Import one of the two packages "
            "only."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[dora] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[dora] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[dora] = "lora_"
    peft.helpers.LoraLayer = (LoraLayer, layer_cls)  # type: ignore[assignment, misc]
    _patch_config(config_cls)
    _patch_model(layer_cls)
    _patch_transformers()
    _patch(accelerate.hooks, "add_hook_to_module", staying_add_hook)
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        _patch_state_dict_functions()


def _patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by make(original), from the original each time: patching twice does not stack."""
    current = inspect.getattr_static(owner, name)
    original = getattr(current, "_dora_peft_original", current)
    if isinstance(original, classmethod):
        new: Any = make(original.__func__)
        wrapped: Any = classmethod(wraps(original.__func__)(new))
    else:
        wrapped = wraps(original)(make(original))
    wrapped._dora_peft_original = original
    setattr(owner, name, wrapped)


def _is_dora(model: Any) -> bool:
    return getattr(model, "peft_type", None) == "DORA"


# ---- 2. configs


def _patch_config(config_cls: Any) -> None:
    from ..config import MARKER

    def marked(entries: dict[str, Any]) -> bool:
        return isinstance(entries.get("auto_mapping"), dict) and MARKER in entries["auto_mapping"]

    def get_peft_type(original: Any) -> Any:
        def _get_peft_type(cls: Any, model_id: str, **kwargs: Any) -> str:
            try:
                found = original(cls, model_id, **kwargs)
            except ValueError as error:
                raise _with_listing(error, model_id) from error
            if found != "LORA":
                return found
            # the original has just found or downloaded the file
            entries = _read_config(cls, model_id, **kwargs)
            return "DORA" if marked(entries) or (_into_dora.get() and entries.get("use_dora")) else found

        return _get_peft_type

    def from_peft_type(original: Any) -> Any:
        def from_peft_type(cls: Any, **kwargs: Any) -> Any:
            if cls is PeftConfig and kwargs.get("peft_type") in ("LORA", "DORA") and marked(kwargs):
                return config_cls.from_peft_type(**kwargs)
            return original(cls, **kwargs)

        return from_peft_type

    def from_pretrained(original: Any) -> Any:
        def from_pretrained(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(cls, path, *args, **kwargs)
            except ValueError as error:
                raise _with_listing(error, path) from error

        return from_pretrained

    def from_json_file(original: Any) -> Any:
        def from_json_file(cls: Any, path: str, **kwargs: Any) -> Any:
            try:
                entries = original(cls, path, **kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"'{path}' is not JSON: {error}. Save or download the adapter again.") from error
            if not isinstance(entries, dict):
                raise ValueError(
                    f"'{path}' is not a JSON object (found {type(entries).__name__}). Save or download the adapter "
                    "again."
                )
            return entries

        return from_json_file

    _patch(PeftConfigMixin, "from_json_file", from_json_file)
    _patch(PeftConfigMixin, "from_pretrained", from_pretrained)
    _patch(PeftConfigMixin, "_get_peft_type", get_peft_type)
    _patch(PeftConfigMixin, "from_peft_type", from_peft_type)


def _with_listing(error: ValueError, path: Any) -> ValueError:
    """PEFT's "Can't find 'adapter_config.json'", with what is there instead and what to pass."""
    if (
        not str(error).startswith(f"Can't find '{CONFIG_NAME}'")
        or not os.path.isdir(path)
        or ": expected" in str(error)
    ):
        return error
    return ValueError(
        f"{error}: expected the folder of a saved adapter, found {sorted(os.listdir(path))[:5]}. Pass the folder that "
        "save_pretrained wrote (an adapter that is not named 'default' has a subfolder)."
    )


def _read_config(cls: Any, model_id: str, **kwargs: Any) -> dict[str, Any]:
    subfolder = kwargs.get("subfolder")
    path = os.path.join(model_id, subfolder) if subfolder is not None else model_id
    file = os.path.join(path, CONFIG_NAME)
    if not os.path.isfile(file):
        file = peft.config.hf_hub_download(model_id, CONFIG_NAME, **kwargs)
    return cls.from_json_file(file)


# ---- 3 to 7. models


def _patch_model(layer_cls: type) -> None:
    def save_pretrained(original: Any) -> Any:
        signature = inspect.signature(original)

        def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            if not _is_dora(self) or not bound.arguments["is_main_process"]:
                return original(self, *args, **kwargs)
            target = str(bound.arguments["save_directory"])
            if os.path.isfile(target):
                raise ValueError(f"Provided path ({target}) should be a directory, not a file")
            try:
                with staged_directory(target) as staging:
                    if os.path.exists(os.path.join(target, "README.md")):
                        shutil.copy2(os.path.join(target, "README.md"), staging)
                    bound.arguments["save_directory"] = staging
                    original(*bound.args, **bound.kwargs)
                    from ..adapters.card import complete_model_card

                    selected = bound.arguments["selected_adapters"] or [self.active_adapter]
                    name = self.active_adapter if self.active_adapter in selected else selected[0]
                    complete_model_card(staging, self.peft_config[name])
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"Could not save the adapter in '{target}': {error}. Nothing was written or replaced there. Free "
                    "space, or choose another directory."
                ) from error

        return save_pretrained

    def load_adapter(original: Any) -> Any:
        def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            if not _is_dora(self):
                return original(self, model_id, adapter_name, *args, **kwargs)
            from ..model import Undo

            undo, known = Undo(self, adapter_name), adapter_name in self.peft_config
            token = _into_dora.set(True)
            try:
                if known:
                    _adopt_row_records(self.peft_config[adapter_name], model_id, kwargs)
                return original(self, model_id, adapter_name, *args, **kwargs)
            except Exception as error:
                if not known and adapter_name in self.peft_config:
                    self.delete_adapter(adapter_name)
                undo()
                raise _explained(error, model_id) from error
            finally:
                _into_dora.reset(token)

        return load_adapter

    def from_pretrained(original: Any) -> Any:
        def from_pretrained(cls: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            from ..model import Undo

            undo = Undo(model, kwargs.get("adapter_name", "default"))

            def roll_back() -> None:
                if not undo.layers and any(isinstance(m, layer_cls) for m in model.modules()):
                    undo()
                    model.__dict__.pop("peft_config", None)

            with ExitStack() as rollback:
                rollback.callback(roll_back)
                loaded = original(cls, model, *args, **kwargs)
                rollback.pop_all()
            return loaded

        return from_pretrained

    def add_adapter(original: Any) -> Any:
        def add_adapter(self: PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
            kinds = {str(self.peft_type), str(peft_config.peft_type)}
            if self.peft_type != peft_config.peft_type and "PeftType.DORA" in kinds:
                raise ValueError(
                    "Cannot combine adapters with different peft types. Found "
                    f"{self.peft_type} (adapters {', '.join(self.peft_config)}) and {peft_config.peft_type} (adapter "
                    f"'{adapter_name}'). Merge the first with merge_and_unload() before adding the second, or load a "
                    "use_dora adapter of PEFT's with dora_peft.DoraConfig.from_pretrained."
                )
            return original(self, adapter_name, peft_config, *args, **kwargs)

        return add_adapter

    def load_peft_weights(original: Any) -> Any:
        def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> Any:
            folder = os.path.join(model_id, kwargs.get("subfolder") or "")
            names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
            if os.path.isdir(folder) and not any(os.path.exists(os.path.join(folder, name)) for name in names):
                raise ValueError(
                    f"No {names[0]} or {names[1]} in '{folder}', found {sorted(os.listdir(folder))[:5]}. Save the "
                    "adapter again, or download it completely."
                )
            try:
                return original(model_id, *args, **kwargs)
            except SafetensorError as error:
                raise UnreadableAdapterError(
                    f"Cannot read {names[0]} of '{model_id}': {error}. The file is truncated or not a safetensors "
                    "file; save or download the adapter again."
                ) from error

        return load_peft_weights

    def upload_modified_files(original: Any) -> Any:
        def _upload_modified_files(self: PeftModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
            if _is_dora(self):
                from ..adapters.card import complete_model_card, remove_generic_card

                remove_generic_card(str(working_dir))
                self.create_or_update_model_card(str(working_dir))
                complete_model_card(str(working_dir), self.active_peft_config, repo_id)
            return original(self, working_dir, repo_id, *args, **kwargs)

        return _upload_modified_files

    _patch(PeftModel, "_upload_modified_files", upload_modified_files)
    _patch(PeftModel, "save_pretrained", save_pretrained)
    _patch(PeftModel, "load_adapter", load_adapter)
    _patch(PeftModel, "from_pretrained", from_pretrained)
    _patch(PeftModel, "add_adapter", add_adapter)
    for module in (peft.peft_model, peft.utils.save_and_load):
        _patch(module, "load_peft_weights", load_peft_weights)


def _adopt_row_records(config: Any, model_id: Any, kwargs: dict[str, Any]) -> None:
    """Read which rows are tied from a folder whose config is not read otherwise: its adapter exists already."""
    from ..config import MARKER, ROW_RECORDS

    if config.tied_rows is not None and not os.path.isdir(str(model_id)):
        return  # just read from the Hub together with the rest of the config
    hub, _ = PeftModel._split_kwargs(dict(kwargs))
    try:
        entries = _read_config(PeftConfig, str(model_id), **hub)
    except (OSError, ValueError):
        entries = {}  # PEFT does without the file here
    own = (entries.get("auto_mapping") or {}).get(MARKER) or {}
    for name in ROW_RECORDS:
        setattr(config, name, own.get(name))


def _explained(error: Exception, model_id: Any) -> Exception:
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ("size mismatch", "mismatched_sizes")):
        return AdapterShapeError(
            f"The adapter in '{model_id}' does not fit the model: {error}\nIt was trained on another base model, or "
            "saved with another rank than its config says. Load it on its own base model, or pass "
            "ignore_mismatched_sizes=True to skip these tensors."
        )
    return error


def _patch_transformers() -> None:
    def load_adapter(original: Any) -> Any:
        signature = inspect.signature(original)

        def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
            from ..model import Undo

            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            name = bound.arguments["adapter_name"] or "default"
            known = set(getattr(self, "peft_config", {})) if self._hf_peft_config_loaded else set()
            undo = Undo(self, name)
            try:
                info = original(self, *args, **kwargs)
                if self.peft_config[name].peft_type == "DORA":
                    _check_loaded(self, name, bound.arguments)
                return info
            except Exception as error:
                config = getattr(self, "peft_config", {}).get(name)
                if name in known or config is None or config.peft_type != "DORA":
                    raise
                undo()
                del self.peft_config[name]
                if not self.peft_config:
                    del self.peft_config
                    self._hf_peft_config_loaded = False
                raise _explained(error, bound.arguments["peft_model_id"]) from error

        return load_adapter

    _patch(PeftAdapterMixin, "load_adapter", load_adapter)


def _check_loaded(model: Any, adapter_name: str, arguments: dict[str, Any]) -> None:
    """What loading through PEFT checks and converts, after transformers has read the same file."""
    from ..adapters.checkpoint import from_checkpoint, keys_of
    from ..norms.ties import layers

    tensors = arguments["adapter_state_dict"]
    if tensors is None:
        options = {**(arguments["adapter_kwargs"] or {}), **arguments["kwargs"]}
        hub = {k: options[k] for k in ("token", "revision", "subfolder", "cache_dir") if options.get(k) is not None}
        path = arguments["peft_model_id"]
        tensors = peft.utils.save_and_load.load_peft_weights(path, device="cpu", **hub)
    converted = from_checkpoint(model, adapter_name, tensors, model.peft_config[adapter_name])
    for name, layer in layers(model, adapter_name):
        parameters = (*layer.factor_parameters(adapter_name), layer.magnitude(adapter_name))
        for parameter, key in zip(parameters, keys_of(f"{name}.", converted), strict=True):
            value = converted.get(key)
            # differs from what was read for grouped convolutions and where plain PEFT needed an entry
            if value is not None and value.shape == parameter.shape:
                parameter.data.copy_(value)


# ---- 8. PEFT 0.20


def _patch_state_dict_functions() -> None:
    from ..adapters.checkpoint import from_checkpoint, to_checkpoint

    def get_state_dict(original: Any) -> Any:
        def get_peft_model_state_dict(
            model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
        ) -> Any:
            out = original(model, state_dict, adapter_name, *args, **kwargs)
            config = model.peft_config[adapter_name]
            if config.peft_type != "DORA":
                return out
            if config.bias != "none":  # the branch for unknown tuners knows no bias
                suffix = ".bias" if config.bias == "all" else ".base_layer.bias"
                tensors = model.state_dict() if state_dict is None else state_dict
                out.update({k: v for k, v in tensors.items() if k.endswith(suffix)})
            return to_checkpoint(model, adapter_name, out, config, infix="")

        return get_peft_model_state_dict

    def set_state_dict(original: Any) -> Any:
        def set_peft_model_state_dict(
            model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
        ) -> Any:
            config = model.peft_config[adapter_name]
            if config.peft_type == "DORA":
                peft_model_state_dict = from_checkpoint(model, adapter_name, peft_model_state_dict, config)
            return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)

        return set_peft_model_state_dict

    for module in _importers("get_peft_model_state_dict"):
        _patch(module, "get_peft_model_state_dict", get_state_dict)
    for module in _importers("set_peft_model_state_dict"):
        _patch(module, "set_peft_model_state_dict", set_state_dict)


def _importers(name: str) -> Iterator[Any]:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "peft" and name in vars(module):
            yield module


@contextmanager
def plain_peft_configs() -> Iterator[None]:
    """Read marked folders as PEFT does without this package, to compare the two."""
    patched = ("_get_peft_type", "from_peft_type")
    ours = {name: inspect.getattr_static(PeftConfigMixin, name) for name in patched}
    try:
        for name, current in ours.items():
            setattr(PeftConfigMixin, name, current._dora_peft_original)
        yield
    finally:
        for name, current in ours.items():
            setattr(PeftConfigMixin, name, current)


add_peft_type()
