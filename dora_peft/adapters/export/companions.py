"""What goes along with a model's weights: tokenizer, chat template, processors, code of its own, licence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants

from ..formats import UnreadableError
from ..formats.checkpoint import CONFIG
from ..formats.source import local_folder, read_json

# Tables of tokenizers have many names; a pickle or weights have none of these.
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "tokenizer.model.*")
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
# Written anew, or of something else than the model.
_NOT = (
    CONFIG,
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "*_results.json",
    "manifest.json",
    "dora_export.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack")
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "*quantization_config.json")
_TEMPLATES = "additional_chat_templates"


def base_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a base model, downloaded with all that goes along with it if it is a name on the Hub.

    Raises:
        UnreadableError: It cannot be had.
    """
    if Path(source).exists():
        return Path(source)
    return local_folder(str(source), ["*.safetensors", *_COPIED, *_LEGAL, "*.py", f"{_TEMPLATES}/*"])


def companions(folder: Path, config: Mapping[str, object]) -> dict[str, Path]:
    """The files to copy, by their names below the new folder; links are followed.

    Args:
        folder: The base model's.
        config: The config that is going to be written, which says whether the new model is quantised.

    Raises:
        UnreadableError: One is a link that leads out of the folder and of the Hub's cache.
    """
    unwanted = _NOT if "quantization_config" in config else (*_NOT, *_QUANTISED)
    wanted = (*_COPIED, *_LEGAL, *(("*.py",) if _has_own_code(folder) else ()))
    names = [path.name for path in folder.iterdir() if _any(path.name, wanted) and not _any(path.name, unwanted)]
    found = {name: folder / name for name in sorted(names) if Path(name).suffix not in _PICKLES}
    if (folder / _TEMPLATES).is_dir():
        check_inside(folder / _TEMPLATES, folder)
        found.update({f"{_TEMPLATES}/{path.name}": path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))})
    found = {name: path for name, path in found.items() if path.is_file()}
    for path in found.values():
        check_inside(path, folder)
    return found


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of `folder`; those of the Hub's cache stay within it.

    Raises:
        UnreadableError: It does.
    """
    target, own, cache = path.resolve(), folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if not target.is_relative_to(own) and not (target.is_relative_to(cache) and own.is_relative_to(cache)):
        raise UnreadableError(
            f"'{path}' is a link that leads out of its folder, to '{target}'. Copy the file to where the link is."
        )


def _has_own_code(folder: Path) -> bool:
    """Whether a config names classes of the folder's own files, which transformers runs if it is allowed to."""
    names = (CONFIG, "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    return any("auto_map" in (read_json(folder / name) or {}) for name in names)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
