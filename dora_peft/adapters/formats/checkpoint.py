"""The files of a base model: which tensors they hold, read one at a time, and its config."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter import UnreadableError
from .source import local_folder, read_json

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# The names that safetensors has for dtypes.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, and what it is without reading it.

    Attributes:
        file: The name of its file, in the checkpoint's folder.
        dtype: None if torch has no such dtype.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * (1 if self.dtype is None else self.dtype.itemsize)


class Checkpoint:
    """A base model's safetensors files, whose tensors are read one at a time.

    Args:
        source: A folder, one safetensors file, or "owner/name" or "owner/name@revision" on the Hub.

    Attributes:
        folder: Where the files are.
        name: `source` as it was given.
        config: The config.json beside them; empty if there is none.
        entries: By key, in the order of the files.
        metadata: The texts in the head of the first file.

    Raises:
        UnreadableError: There are no such files, the index names what is not in the folder, or one is damaged.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        found = Path(source)
        if not found.exists():
            found = local_folder(str(source), ["*.safetensors", "*.json"])
        self.name = str(source)
        self.folder = found if found.is_dir() else found.parent
        self.config = read_json(self.folder / CONFIG) or {}
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for path in _files_of(found):
            self._read_head(path)

    @property
    def is_quantised(self) -> bool:
        """Whether the config says that weights are; compressed-tensors has called its entry otherwise."""
        return bool({"quantization_config", "compression_config"} & self.config.keys())

    def files(self) -> list[str]:
        """The names of the files, in order."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def tensor(self, key: str) -> Tensor:
        """One tensor as it is stored, on the CPU."""
        # opened each time: what is mapped stays in memory as long as the file is open
        with safe_open(self.folder / self.entries[key].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def _read_head(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata = self.metadata or dict(file.metadata() or {})
                for key in file.keys():  # noqa: SIM118 - the file is no dictionary
                    part = file.get_slice(key)
                    self.entries[key] = Entry(path.name, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise UnreadableError(f"Cannot read the base's '{path}': {' '.join(str(error).split())}.") from error


def _files_of(found: Path) -> list[Path]:
    """The files of tensors: those that the index names, or all in a folder."""
    files = [found] if found.is_file() else sorted(found.glob("*.safetensors"))
    index = found / INDEX
    if index.is_file():
        named = (read_json(index) or {}).get("weight_map")
        names = {str(name) for name in named.values()} if isinstance(named, dict) else set()
        # of the folder itself, whatever a name says
        missing = sorted(name for name in names if Path(name).name != name or not (found / name).is_file())
        if missing or not names:
            raise UnreadableError(
                f"'{found}' is not whole: its index names '{(missing or ['nothing'])[0]}', which is not in it. "
                "Download it again."
            )
        files = sorted(found / name for name in names)
    if not files:
        raise UnreadableError(f"'{found}' holds no base model: expected safetensors files, found none.")
    return files
