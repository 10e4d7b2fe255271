"""A safetensors file written tensor after tensor, so that no more than one is in memory.

safetensors' own writer takes all tensors of a file at once. The format is 8 bytes that say how long the head is, the
head, a JSON object that says where each tensor lies, and the tensors next to each other:
https://huggingface.co/docs/safetensors. The head may end in spaces. It is written last, into space left for it, when
all tensors are known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..formats import UnreadableError
from ..formats.checkpoint import DTYPES

# Of a tensor that are cast, hashed and written at a time.
STEP_BYTES = 16 * 2**20
# Beside a key, in the head: dtype, eight dimensions and two offsets, each of up to 13 digits, with what JSON needs.
ENTRY_BYTES = 200
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """A file being written; `finish` makes it whole.

    Args:
        path: Where to write; what is there is replaced.
        keys_bytes: An upper bound of the bytes of all keys.
        tensors: An upper bound of their number.
        metadata: The texts of the head.
    """

    def __init__(self, path: Path, keys_bytes: int, tensors: int, metadata: Mapping[str, str]) -> None:
        self.metadata = dict(metadata)
        bound = len(json.dumps(self.metadata)) + keys_bytes + ENTRY_BYTES * (tensors + 1)
        self._space = -(-bound // 8) * 8
        self._entries: dict[str, object] = {}
        self._late: list[tuple[str, Tensor]] = []
        self._offset = 0
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.seek(8 + self._space)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, key: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write a tensor, cast to `dtype` block by block.

        Raises:
            UnreadableError: A number of it is too large for `dtype`, or safetensors has no name for its dtype.
        """
        dtype = tensor.dtype if dtype is None else dtype
        if dtype not in _NAMES:
            raise UnreadableError(f"'{key}' is {dtype}, which safetensors files cannot hold. Choose another --dtype.")
        if key in self._entries or any(key == late for late, _ in self._late):
            raise ValueError(f"'{key}' would be written twice.")
        if tensor.numel() * dtype.itemsize % 8:
            # after all others, the widest first: readers want each tensor at a multiple of its elements' size
            self._late.append((key, _cast(key, tensor.detach().reshape(-1), dtype).clone().reshape(tensor.shape)))
        else:
            self._write(key, tensor, dtype)

    def finish(self) -> tuple[int, str]:
        """Write the head and wait for the disk; the file's bytes and `digest_of` it."""
        for key, tensor in sorted(self._late, key=lambda late: -late[1].element_size()):
            self._write(key, tensor, tensor.dtype)
        head = json.dumps({"__metadata__": self.metadata, **self._entries}, separators=(",", ":")).encode()
        if len(head) > self._space:
            raise ValueError(f"The head of '{self._file.name}' takes {len(head)} bytes, and {self._space} were left.")
        head = self._space.to_bytes(8, "little") + head.ljust(self._space)
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._digest.update(head)
        return len(head) + self._offset, self._digest.hexdigest()

    def _write(self, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
        flat = tensor.detach().reshape(-1)
        step = STEP_BYTES // max(dtype.itemsize, flat.element_size())
        start = self._offset
        for first in range(0, len(flat), step):
            data = _cast(key, flat[first : first + step], dtype).view(torch.uint8).numpy().data
            self._file.write(data)
            self._digest.update(data)
            self._offset += len(data)
        shape = list(tensor.shape)
        if dtype == torch.float4_e2m1fn_x2:
            # two numbers in each element of torch's
            shape[-1] *= 2
        self._entries[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, self._offset]}


def _cast(key: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    """A block in `dtype` on the CPU.

    Raises:
        UnreadableError: A finite number is none there.
    """
    cast = part.to("cpu", dtype).contiguous()
    if cast.dtype == part.dtype or not (part.is_floating_point() and dtype.is_floating_point):
        return cast
    if torch.finfo(dtype).max < torch.finfo(part.dtype).max and bool((cast.isinf().cpu() & ~part.isinf().cpu()).any()):
        name = str(dtype).removeprefix("torch.")
        raise UnreadableError(f"'{key}' has numbers too large for {name}. Choose --dtype bf16 or fp32.")
    return cast


def read_head(path: Path) -> dict[str, tuple[int, int]]:
    """By key, where a tensor starts and stops in a safetensors file, counted from the file's first byte.

    Raises:
        ValueError: It has no such head.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.path.getsize(path):
            raise ValueError(f"'{path}' is no safetensors file: its head is longer than it.")
        head = json.loads(file.read(size))
    head.pop("__metadata__", None)
    offsets = {key: entry["data_offsets"] for key, entry in head.items()}
    return {key: (8 + size + start, 8 + size + stop) for key, (start, stop) in offsets.items()}


def digest_of(path: Path) -> str:
    """Of a whole file: of the tensors, then of what precedes them, which is the order in which they are written."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        head = 8 + int.from_bytes(file.read(8), "little")
        file.seek(head)
        while block := file.read(STEP_BYTES):
            digest.update(block)
        file.seek(0)
        digest.update(file.read(head))
    return digest.hexdigest()
