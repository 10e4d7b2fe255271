"""What a format is written as, and writing it so that a folder is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..._files import saving

FORMAT = torch.contiguous_format
# What a folder may hold to be replaced.
OF_ADAPTERS = {
    "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "adapters.safetensors", "README.md",
    "pytorch_lora_weights.safetensors", ".gitattributes", "dora_export.json",
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """An adapter's files.

    Attributes:
        name: The file of tensors.
        tensors, metadata: What it holds.
        json: Other files, by name.
    """

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    json: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_files(files: Files, target: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Write all of the files into a folder, or nothing.

    Args:
        files: What to write.
        target: The folder; or the file, if the name ends in ".safetensors" and there are no others.
        force: Replace what is there: the whole folder, or the file.

    Returns:
        The files' paths.

    Raises:
        NotSavedError: It cannot be written; what was there is as it was.
        FileExistsError, ValueError: See `check_target`.
    """
    path = check_target(files, target, force=force)
    single = path.suffix == ".safetensors"
    with saving("the adapter", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        try:
            made = staging / "new"
            made.mkdir()
            name = path.name if single else files.name
            # tensors that share memory are refused by safetensors
            tensors = {key: t.detach().cpu().clone(memory_format=FORMAT) for key, t in files.tensors.items()}
            save_file(tensors, made / name, metadata=files.metadata or None)
            for other, content in files.json.items():
                (made / other).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if single:
                os.replace(made / name, path)
                return [path]
            if path.exists():
                os.replace(path, staging / "old")
            try:
                os.replace(made, path)
            except OSError:
                if (staging / "old").exists():
                    os.replace(staging / "old", path)
                raise
            return [path / name, *(path / other for other in files.json)]
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_target(files: Files, target: str | os.PathLike[str], *, force: bool) -> Path:
    """Where files may be written.

    Raises:
        FileExistsError: Something is there, and `force` is not set, or it is more than an adapter.
        ValueError: It is one file and there are more, or lies below a file.
    """
    path = Path(target)
    if path.suffix == ".safetensors" and files.json:
        raise ValueError(f"'{path}' is one file, and {', '.join(files.json)} belongs to it as well: name a folder.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"'{path}' cannot be made: '{above}' is no folder. Choose another name.")
    taken = path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))
    if not taken:
        return path
    if not force:
        raise FileExistsError(f"'{path}' is there already. Choose another name, or pass --force to replace it.")
    entries = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    foreign = sorted(name for name in entries if name not in OF_ADAPTERS or not (path / name).is_file())
    if path.is_symlink() or not (path.is_dir() or path.is_file()) or foreign:
        what = f"holds '{foreign[0]}', which is no part of one" if foreign else "is none"
        raise FileExistsError(f"'{path}' {what}: --force replaces an adapter alone. Choose another name.")
    return path
