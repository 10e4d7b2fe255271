"""llama.cpp's files: a .gguf whose rows of adapted modules are scaled by c.

The size of no tensor changes, so the new file is the old one byte for byte, but for the scales of those rows, or the
rows themselves if they are floating point. Needs the package `gguf`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ...formats.adapter import UnreadableError
from .gguf_file import FLOATS, GgufFile, Stored

# By type: at which bytes of a block its fp16 scale, and offset or scale of minima, lie. What else is in a block is
# multiplied by them.
PLACES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
# Rows that are changed at a time.
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Rewritten:
    """What became of one module.

    Attributes:
        tensor: Its name in the file.
        kind: Its type there, "Q4_0".
        lost: The share of rows with c other than 1 whose scales, or numbers, are all what they were, as if c were 1.
    """

    tensor: str
    kind: str
    lost: float


class _Place(NamedTuple):
    """One module's tensor in the file, and c in the order of its rows."""

    path: str
    tensor: Stored
    c: Tensor

    @property
    def kind(self) -> str:
        return self.tensor.kind


def rewrite_gguf(
    source: str | os.PathLike[str], out: str | os.PathLike[str], scales: Mapping[str, Tensor]
) -> dict[str, Rewritten]:
    """Write a .gguf whose rows of some modules are c times what they were; codes, other tensors and metadata stay.

    Args:
        source: A .gguf of a whole model, in one of `PLACES`' types or floating point.
        out: The new file; written beside it first, and renamed at the end.
        scales: c by the path that a module has in Hugging Face's model ("model.layers.0.self_attn.q_proj"), [out].

    Returns:
        By path, what became of each.

    Raises:
        UnreadableError: The file is none, a module is not in it, its type or the order of its rows is not known here,
            or a scale leaves fp16's range; or the package `gguf` is not installed. Nothing was written.
    """
    source, out = Path(source), Path(out)
    if out.exists() and out.samefile(source):
        raise UnreadableError(f"'{out}' is the base itself: expected another file to write.")
    places = _find(GgufFile(source), scales)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.copyfile(source, partial)
        with partial.open("r+b") as file:
            report = {one.path: _rewrite(file, one) for one in places}
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return report


def scaled_rows(file: GgufFile, path: str, c: Tensor) -> Tensor:
    """What the rows of one module become by `rewrite_gguf`: [out, in] in fp32, in the order of Hugging Face's model.

    Args:
        file: The .gguf.
        path: The module's, in Hugging Face's model.
        c: [out].

    Raises:
        UnreadableError: See `rewrite_gguf`.
    """
    (place,) = _find(file, {path: c})
    data = file.data(place.tensor)
    _scale(place, data, place.c)
    return file.in_models_order(place.tensor.name, file.numbers(place.tensor, data))


def _find(file: GgufFile, scales: Mapping[str, Tensor]) -> list[_Place]:
    """Where in the file each module's tensor is, checked wholly."""
    places = []
    for path, c in scales.items():
        name = f"{file.name_of(path) or path}.weight"
        tensor = file.tensors.get(name)
        if tensor is None or name == "token_embd.weight":
            tied = name == "output.weight" and "token_embd.weight" in file.tensors
            found = "its head is tied to the embedding" if tied else f"it has no rows for c by the name '{name}'"
            mend = "leave the module out" if tied or name == "token_embd.weight" else "name the adapter's base"
            raise UnreadableError(
                f"'{file.path}', module '{path}': {found}: {mend}, or convert the exported base instead."
            )
        shape = list(tensor.shape)
        if len(shape) != 2 or tuple(c.shape) != (shape[0],) or not torch.isfinite(c).all():
            found = f"c of shape {list(c.shape)} for a tensor {shape}"
            raise UnreadableError(
                f"'{file.path}', module '{path}': {found}: expected one finite number a row of a matrix."
            )
        if tensor.kind not in PLACES and tensor.kind not in FLOATS:
            raise UnreadableError(
                f"'{file.path}', module '{path}': its type is {tensor.kind}: expected one of "
                f"{', '.join([*PLACES, *FLOATS])}; convert the exported base instead."
            )
        places.append(_Place(path, tensor, file.in_order(tensor.name, c.detach().double().cpu())))
    return places


def _rewrite(file: BinaryIO, place: _Place) -> Rewritten:
    """Multiply the rows of one tensor in the new file."""
    rows = len(place.c)
    row_bytes = place.tensor.nbytes // rows
    step = max(1, BLOCK_BYTES // row_bytes)
    lost = 0
    for start in range(0, rows, step):
        c = place.c[start : start + step]
        at = place.tensor.offset + start * row_bytes
        file.seek(at)
        data = torch.frombuffer(bytearray(file.read(len(c) * row_bytes)), dtype=torch.uint8).view(len(c), row_bytes)
        before = data.clone()
        _scale(place, data, c)
        # of zeros c is not lost
        lost += int(((data == before).all(1) & (c != 1) & _any(place, before)).sum())
        file.seek(at)
        file.write(data.numpy().tobytes())
    return Rewritten(place.tensor.name, place.kind, lost / rows)


def _scale(place: _Place, data: Tensor, c: Tensor) -> None:
    """Multiply rows of bytes by c in place."""
    if place.kind not in FLOATS:
        _scale_blocks(place, data, c)
        return
    numbers = data.view(FLOATS[place.kind])
    numbers.copy_(_finite(place, numbers.double() * c[:, None], numbers.dtype))


def _blocks(place: _Place, data: Tensor) -> Tensor:
    """Rows of bytes by blocks, [rows, blocks, bytes]."""
    import gguf

    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[place.kind]][1]
    return data.view(len(data), -1, size)


def _scale_blocks(place: _Place, data: Tensor, c: Tensor) -> None:
    blocks = _blocks(place, data)
    for at in PLACES[place.kind]:
        part = blocks[:, :, at : at + 2]
        scale = part.contiguous().view(torch.float16)
        part.copy_(_finite(place, scale.double() * c[:, None, None], torch.float16).view(torch.uint8))


def _any(place: _Place, data: Tensor) -> Tensor:
    """Which rows have a scale, or a number, other than zero."""
    if place.kind in FLOATS:
        return (data.view(FLOATS[place.kind]) != 0).any(1)
    blocks = _blocks(place, data)
    parts = [blocks[:, :, at : at + 2].contiguous().view(torch.float16) for at in PLACES[place.kind]]
    return torch.cat(parts, -1).flatten(1).ne(0).any(1)


def _finite(place: _Place, product: Tensor, dtype: torch.dtype) -> Tensor:
    found = product.to(dtype)
    if not torch.isfinite(found).all():
        largest = float(product.abs().max())
        raise UnreadableError(
            f"Module '{place.path}': c times its scales reaches {largest:.3g}: expected at most "
            f"{torch.finfo(dtype).max:.3g} ({dtype}); convert the exported base instead."
        )
    return found
