"""The files of an adapter: found in a folder, by themselves or on the Hub, and read without executing anything."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter import UnreadableError

CONFIG = "adapter_config.json"
# In this order: what PEFT, mlx-lm and diffusers call their files.
NAMES = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """An adapter's file as it is.

    Attributes:
        path: The file of tensors.
        tensors: By key.
        metadata: The texts in the head of a safetensors file.
        config: The adapter_config.json beside it; None if there is none.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] | None = None


def read_source(adapter: str | os.PathLike[str], *, allow_pickle: bool = False) -> Source:
    """The tensors and the config of an adapter.

    Args:
        adapter: A folder, a file, or a repository on the Hub, "owner/name" or "owner/name@revision".
        allow_pickle: Also read files that torch.save made, their tensors alone (`weights_only`).

    Raises:
        UnreadableError: There is no such adapter, or more than one; a file is damaged, or leads out of its folder.
    """
    found = Path(adapter)
    if not found.exists():
        found = _download(str(adapter), allow_pickle)
    path = found if found.is_file() else _tensors_in(found, allow_pickle)
    _check_inside(path, found)
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise UnreadableError(
                f"'{path}' was made by torch.save, which can hold programs: expected a safetensors file. Pass "
                "--allow-pickle (allow_pickle=True) to read its tensors alone."
            )
        return Source(path, _read_pickle(path), config=read_json(path.parent / CONFIG))
    tensors, metadata = _read_safetensors(path)
    return Source(path, tensors, metadata, read_json(path.parent / CONFIG))


def local_folder(name: str, patterns: list[str]) -> Path:
    """The folder of "owner/name" or "owner/name@revision" in the Hub's cache, downloaded if need be.

    Raises:
        UnreadableError: It cannot be had.
    """
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except HFValidationError:
        raise UnreadableError(f"'{name}' is no folder, no file, and no repository's name (owner/name).") from None
    except Exception as error:
        # of many kinds: no network, no such repository, no right to it
        said = str(error).strip().splitlines()
        raise UnreadableError(
            f"'{name}' is no folder or file here, and cannot be had from the Hub: {type(error).__name__}: "
            f"{said[0] if said else ''}"
        ) from error


def read_json(path: Path) -> dict[str, object] | None:
    """A JSON object in a file; None if there is no file.

    Raises:
        UnreadableError: It is none.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(f"Cannot read '{path}': expected a JSON object, found {error}.") from error
    if not isinstance(found, dict):
        raise UnreadableError(f"Cannot read '{path}': expected a JSON object, found {str(found)[:60]!r}.")
    return found


def _download(name: str, allow_pickle: bool) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UnreadableError(f"There is no folder or file '{name}'.")
    return local_folder(name, ["*.safetensors", "*.json", *(f"*{end}" for end in PICKLES if allow_pickle)])


def _tensors_in(folder: Path, allow_pickle: bool) -> Path:
    """The one file of tensors in a folder."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" and p.is_file())
    found = found or sorted(p for p in folder.iterdir() if p.suffix in PICKLES and p.is_file())
    if len(found) == 1:
        return found[0]
    names = [p.name for p in (found or sorted(folder.iterdir()))][:5]
    raise UnreadableError(
        f"'{folder}' holds {'no adapter' if not found else 'more than one file that may be the adapter'}: expected "
        f"one safetensors file, found {', '.join(names) or 'nothing'}. Name the file itself."
    )


def _check_inside(path: Path, asked: Path) -> None:
    """Refuse a link that leads out of the folder that was asked for; those of the Hub's cache stay within it."""
    folder = (asked if asked.is_dir() else asked.parent).resolve()
    cache = Path(constants.HF_HUB_CACHE).resolve()
    for file in (path, path.parent / CONFIG):
        if not file.is_symlink():
            continue
        target = file.resolve()
        if not target.is_relative_to(folder) and not (target.is_relative_to(cache) and folder.is_relative_to(cache)):
            raise UnreadableError(
                f"'{file}' is a link that leads out of its folder, to '{target}'. Copy the file to where the link is."
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            tensors, metadata = {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UnreadableError(
            f"Cannot read '{path}': expected a whole safetensors file, found: {' '.join(str(error).split())}. Save or "
            "download it again."
        ) from error
    _check_keys(path, keys)
    return tensors, metadata


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise UnreadableError(
            f"Cannot read '{path}': expected tensors saved by torch.save, found {type(error).__name__}: "
            f"{lines[0] if lines else ''} Nothing in it was executed."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in found.items()):
        raise UnreadableError(f"Cannot read '{path}': expected tensors by name, found {str(found)[:60]!r}.")
    _check_keys(path, list(found))
    for key, tensor in found.items():
        dense = tensor.layout is torch.strided and not tensor.is_meta
        if not dense or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise UnreadableError(f"Cannot read '{path}': '{key}' is no dense tensor with a number for each element.")
    return found


def is_name(text: str) -> bool:
    """Whether a text may be the path of a module, which no file's name is made of."""
    return text.isprintable() and not any(part in text for part in ("/", "\\", ".."))


def _check_keys(path: Path, keys: list[str]) -> None:
    bad = [key for key in keys if not is_name(key)]
    if bad:
        raise UnreadableError(
            f"Cannot read '{path}': its keys should be names of modules, and {bad[0][:80]!r} holds a separator of "
            "paths or what cannot be printed."
        )
    if not keys:
        raise UnreadableError(f"'{path}' holds no tensors.")
