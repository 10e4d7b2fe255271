"""Patches of PEFT's config class: a marked folder gives a DoraConfig, and errors about folders say what is wrong."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import peft.config
from peft import PeftConfig
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME

from .._own_entries import MARKER
from ..config import DoraConfig
from .patching import Function, patch, unpatched

# Set while an adapter is loaded into a model that already is DoRA: PEFT's own use_dora folders are then taken as DoRA.
into_dora: ContextVar[bool] = ContextVar("into_dora", default=False)


def install() -> None:
    """Patch PeftConfigMixin."""
    patch(PeftConfigMixin, "from_json_file", _from_json_file)
    patch(PeftConfigMixin, "from_pretrained", _from_pretrained)
    patch(PeftConfigMixin, "_get_peft_type", _get_peft_type)
    patch(PeftConfigMixin, "from_peft_type", _from_peft_type)


def plain_peft_configs() -> AbstractContextManager[None]:
    """Read marked folders as PEFT does without this package, to compare the two."""
    return unpatched(PeftConfigMixin, "_get_peft_type", "from_peft_type")


def read_config(model_id: str, subfolder: str | None = None, **kwargs: Any) -> dict[str, object]:
    """The entries of an adapter_config.json.

    Args:
        model_id: The adapter's folder or Hub repository.
        subfolder: Where in it.
        kwargs: Of `hf_hub_download`.

    Raises:
        OSError: It is not there.
        ValueError: It is not a JSON object.
    """
    file = os.path.join(model_id, subfolder or "", CONFIG_NAME)
    if not os.path.isfile(file):
        file = peft.config.hf_hub_download(model_id, CONFIG_NAME, subfolder=subfolder, **kwargs)
    return PeftConfig.from_json_file(file)


def _marked(entries: dict[str, object]) -> bool:
    mapping = entries.get("auto_mapping")
    return isinstance(mapping, dict) and MARKER in mapping


def _get_peft_type(original: Function) -> Function:
    def _get_peft_type(cls: type[PeftConfig], model_id: str, **kwargs: Any) -> object:
        try:
            found = original(cls, model_id, **kwargs)
        except ValueError as error:
            raise _with_listing(error, model_id) from error
        if found != "LORA" and isinstance(found, str) and found in PEFT_TYPE_TO_CONFIG_MAPPING:
            return found
        # the original has just found or downloaded the file
        entries = read_config(model_id, **kwargs)
        if found != "LORA":
            if _marked(entries):
                raise ValueError(f"peft_type must be 'LORA' in dora_peft's folders, found {found!r} in '{model_id}'.")
            return found
        return "DORA" if _marked(entries) or (into_dora.get() and entries.get("use_dora")) else found

    return _get_peft_type


def _from_peft_type(original: Function) -> Function:
    def from_peft_type(cls: type[PeftConfig], **kwargs: object) -> object:
        if cls is PeftConfig and _marked(kwargs):
            return DoraConfig.from_peft_type(**kwargs)
        return original(cls, **kwargs)

    return from_peft_type


def _from_pretrained(original: Function) -> Function:
    def from_pretrained(cls: type[PeftConfig], path: str | os.PathLike[str], *args: object, **kwargs: object) -> object:
        try:
            return original(cls, path, *args, **kwargs)
        except ValueError as error:
            raise _with_listing(error, path) from error

    return from_pretrained


def _from_json_file(original: Function) -> Function:
    def from_json_file(cls: type[PeftConfig], path: str, **kwargs: object) -> object:
        try:
            with open(path, encoding="utf-8") as file:
                entries = json.load(file)
        except ValueError as error:
            raise ValueError(f"'{path}' is not JSON: {error}. Save or download the adapter again.") from error
        # PEFT looks for entries in whatever it finds
        if not isinstance(entries, dict):
            raise ValueError(
                f"'{path}' is not a JSON object (found {type(entries).__name__}). Save or download the adapter again."
            )
        return original(cls, path, **kwargs)

    return from_json_file


def _with_listing(error: ValueError, path: str | os.PathLike[str]) -> ValueError:
    """PEFT's "Can't find 'adapter_config.json'", with what is there instead and what to pass."""
    found = str(error)
    if not found.startswith(f"Can't find '{CONFIG_NAME}'") or ": expected" in found or not os.path.isdir(path):
        return error
    return ValueError(
        f"{error}: expected the folder of a saved adapter, found {sorted(os.listdir(path))[:5]}. Pass the folder that "
        "save_pretrained wrote (an adapter that is not named 'default' has a subfolder)."
    )
