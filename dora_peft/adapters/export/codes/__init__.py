"""Quantised bases whose codes stay: c goes into the scales (and offsets) of each row's groups.

base.py      what all share: `Codes`                      bits.py      codes in 32-bit words
bitsandbytes.py  nf4, fp4, int8                           gptq.py      GPTQ, AWQ
hqq.py       HQQ                                          fp8.py       8-bit floats: by row, block, tensor
compressed_tensors.py  W4A16, W8A16, W8A8                 gguf.py      a whole file of llama.cpp's, gguf_file.py
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ....bases.inspection import FLOATS
from ...formats.checkpoint import Checkpoint, Entry
from . import bitsandbytes, compressed_tensors, fp8, gptq, hqq
from .base import Codes, Stored

__all__ = ["Codes", "codes_among", "codes_of", "quantised_paths"]

# compressed-tensors before the 8-bit floats of others, whose names are the same
FORMATS = (bitsandbytes, gptq, hqq, compressed_tensors, fp8)


def codes_of(checkpoint: Checkpoint, path: str) -> Codes | None:
    """The quantised weight of one module of a checkpoint; reads what describes it, and no codes.

    Args:
        path: The module's, as the files' keys begin.

    Returns:
        None if the weight is floating point, or nothing is stored under this path.

    Raises:
        UnreadableError: It is quantised in a way that is not known here, or is damaged.
    """
    stored = Stored(checkpoint, path)
    for one in FORMATS:
        found = one.recognise(stored)
        if found is not None:
            return found
    if stored.has("weight") and stored.dtype("weight") in FLOATS:
        return None
    # names with dots are those of modules below it, and a module of floats has tensors of any name
    odd = [name for name in stored.names if "." not in name and not _plain(stored, name)]
    odd += [name for name in stored.names if name.startswith("weight.")]
    if not odd:
        return None
    raise stored.error(
        f"quant_method '{stored.method}' with '{odd[0]}' ({stored.dtype(odd[0])})",
        "bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors or 8-bit floats",
        "name the base before quantisation",
    )


def codes_among(checkpoint: Checkpoint, path: str, tensors: Mapping[str, Tensor]) -> Codes:
    """The weight that a module's new tensors are, such as `Codes.times` gives them.

    Args:
        checkpoint: Where the module was, whose config says how it is quantised.
        path: The module's, as the keys begin.
        tensors: By key.
    """
    found = codes_of(_Among(checkpoint, tensors), path)
    assert found is not None
    return found


class _Among(Checkpoint):
    """Tensors in memory in the place of a checkpoint's own."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.folder, self.config = checkpoint.name, checkpoint.folder, checkpoint.config
        self.metadata = checkpoint.metadata
        self._tensors = tensors
        self.entries = {key: Entry("", tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def quantised_paths(checkpoint: Checkpoint) -> list[str]:
    """The paths of all modules of a checkpoint whose weights are quantised, in the order of the files.

    Raises:
        UnreadableError: As `codes_of`, of the first that is not known.
    """
    paths = dict.fromkeys(key.rpartition(".")[0] for key in checkpoint.entries)
    return [path for path in paths if not _is_part(checkpoint, path) and codes_of(checkpoint, path) is not None]


def _is_part(checkpoint: Checkpoint, path: str) -> bool:
    """Whether a path is no module's, but that of a tensor, beside whose key are longer ones ("weight.absmax")."""
    parts = path.split(".")
    return not path or any(".".join(parts[:count]) in checkpoint.entries for count in range(1, len(parts) + 1))


def _plain(stored: Stored, name: str) -> bool:
    """Whether a tensor may be that of any module: floats, or a counter."""
    return stored.dtype(name) in (*FLOATS, torch.int64, torch.bool)
