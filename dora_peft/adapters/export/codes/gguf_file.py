"""A file of llama.cpp's: which tensors it holds, their bytes, what these stand for, and the order of their rows.

Needs the package `gguf`, whose reader maps the file; only where the tensors lie is kept of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...formats.adapter import UnreadableError

if TYPE_CHECKING:
    import gguf

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Architectures whose rows lie as in Hugging Face's files, and those in which the rows of q and k of each head are
# interleaved: first of the first half, first of the second half, second of the first half ...
AS_THEY_ARE = (
    "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi2", "phi3", "starcoder2", "olmo2",
    "gpt2",
)  # fmt: skip
INTERLEAVED = ("llama", "granite", "olmo")


class Stored(NamedTuple):
    """Where one tensor lies.

    Attributes:
        name: In the file, "blk.0.attn_q.weight".
        kind: Its type there, "Q4_0".
        shape: In torch's order, the rows first.
        offset, nbytes: In the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """How many rows of bytes it has; 1 of a vector."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))


class GgufFile:
    """A .gguf of a whole model.

    Attributes:
        path: The file.
        architecture: What llama.cpp calls the model.
        tensors: By their names in the file.

    Raises:
        UnreadableError: The file is none, is a part of several, has another order of bytes, or the order of its rows
            is not known here; or the package `gguf` is not installed.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.path = Path(source)
        reader = _read(self.path)
        self.architecture = str(_value(reader, "general.architecture") or "")
        self._names = _names(self.path, reader, self.architecture)
        self._heads: dict[str, object] = {}
        if self.architecture in INTERLEAVED:
            heads = _value(reader, f"{self.architecture}.attention.head_count")
            few = _value(reader, f"{self.architecture}.attention.head_count_kv")
            self._heads = {"attn_q": heads, "attn_k": heads if few is None else few}
        parts = _value(reader, "split.count")
        if isinstance(parts, int) and parts > 1:
            raise UnreadableError(
                f"'{self.path}' is one of {parts} files of a model: join them by llama-gguf-split --merge, and name "
                "what it writes."
            )
        self.tensors = {
            tensor.name: Stored(
                str(tensor.name), str(tensor.tensor_type.name), tuple(tensor.shape.tolist()[::-1]),
                int(tensor.data_offset), int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }  # fmt: skip

    def name_of(self, path: str) -> str | None:
        """What the file calls a module of Hugging Face's model, without ".weight"; None if llama.cpp has no such."""
        found = self._names.get_name(path)
        return None if found is None else str(found)

    def data(self, tensor: Stored) -> Tensor:
        """A tensor's bytes, [rows, bytes of a row]."""
        data = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        if len(data) != tensor.nbytes:
            raise UnreadableError(f"'{self.path}' ends within '{tensor.name}': expected a whole .gguf.")
        return torch.from_numpy(data).view(tensor.rows, -1)

    def numbers(self, tensor: Stored, data: Tensor) -> Tensor:
        """What bytes of the tensor stand for, in fp32 and the tensor's shape, as gguf's own package gives them.

        Raises:
            UnreadableError: That package does not know the type.
        """
        import gguf

        if tensor.kind in FLOATS:
            return data.flatten().view(FLOATS[tensor.kind]).float().view(tensor.shape)
        try:
            found = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[tensor.kind])
        except NotImplementedError as error:
            raise UnreadableError(
                f"'{self.path}', tensor '{tensor.name}': the package gguf does not dequantise {tensor.kind}: pip "
                "install --upgrade gguf, or name the base in another type."
            ) from error
        return torch.from_numpy(np.array(found, dtype=np.float32)).view(tensor.shape)

    def in_order(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor, or numbers of each, from Hugging Face's order to the file's."""
        heads = self._heads_of(name, rows)
        if heads is None:
            return rows
        return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def in_models_order(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor from the file's order to Hugging Face's."""
        heads = self._heads_of(name, rows)
        if heads is None:
            return rows
        return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def _heads_of(self, name: str, rows: Tensor) -> int | None:
        """By how many heads the rows of a tensor are interleaved; None if they are not.

        Raises:
            UnreadableError: The file does not say it, or the rows are no heads.
        """
        part = name.split(".")[-2] if "." in name else ""
        if part not in self._heads:
            return None
        heads = self._heads[part]
        if not isinstance(heads, int) or heads < 1 or len(rows) % (2 * heads):
            raise UnreadableError(
                f"'{self.path}' says that '{name}' of {len(rows)} rows has {heads} heads: expected one number, with "
                "pairs for each head."
            )
        return heads


def _read(source: Path) -> gguf.GGUFReader:
    try:
        import gguf
    except ImportError as error:
        raise UnreadableError(f"'{source}': reading a .gguf needs the package gguf: pip install gguf.") from error
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, LookupError, OSError) as error:
        said = " ".join(str(error).split())
        raise UnreadableError(f"'{source}' is no file of llama.cpp's: {said}: expected a whole .gguf.") from error
    if reader.byte_order != "I":
        raise UnreadableError(f"'{source}' is in another machine's order of bytes: expected this one's.")
    return reader


def _names(source: Path, reader: gguf.GGUFReader, architecture: str) -> gguf.TensorNameMap:
    import gguf

    known = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in (*AS_THEY_ARE, *INTERLEAVED) or architecture not in known:
        raise UnreadableError(
            f"'{source}' is of the architecture '{architecture}', whose order of rows is not known here: expected one "
            f"of {', '.join((*AS_THEY_ARE, *INTERLEAVED))}; convert the exported base instead."
        )
    blocks = _value(reader, f"{architecture}.block_count")
    if not isinstance(blocks, int):
        raise UnreadableError(f"'{source}' says {architecture}.block_count {blocks}: expected one number.")
    return gguf.get_tensor_name_map(known[architecture], blocks)


def _value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()
