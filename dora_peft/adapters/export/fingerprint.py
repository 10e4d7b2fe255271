"""By what an exact export's adapter knows the base that was made for it: over W0 itself it would be another adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ...bases import Dense
from ..formats import Adapter, Base, UnreadableError
from ..formats.base import skeleton
from .codes import codes_of
from .names import Names

# Where the adapter's file has the digests of the base's weights, by path.
KEY = "dora_peft_base"


def digest_of(matrix: Tensor) -> str:
    """What a weight is recognised by: SHA-256 of its rows [out, in] in the dtype that they are stored in."""
    hashed = hashlib.sha256()
    for rows in matrix.split(max(1, 2**24 // max(1, matrix[0].nbytes))):
        add(hashed, rows)
    return hashed.hexdigest()


def add(hashed: hashlib._Hash, rows: Tensor) -> None:
    """The bytes of some rows, for a digest that is made of blocks."""
    hashed.update(rows.contiguous().cpu().view(torch.uint8).numpy().data)


def other_weights(metadata: Mapping[str, str], adapter: Adapter, base: Base) -> list[str]:
    """The modules of an adapter whose weights in a base are not those that the adapter was made for.

    Args:
        metadata: Of the adapter's file, with `KEY` in it.
        adapter: What the file holds.
        base: The base.

    Raises:
        UnreadableError: The digests are damaged, or a weight cannot be read.
    """
    try:
        known = dict(json.loads(metadata[KEY]))
    except (ValueError, TypeError) as error:
        raise UnreadableError(f"The adapter's '{KEY}' is damaged: {error}. Export it again.") from error
    names = _names(base)
    found = []
    for path in known:
        if path in adapter.modules:
            matrix = _matrix(path, adapter, base, names)
            if matrix is None or digest_of(matrix) != known[path]:
                found.append(path)
    return found


def _names(base: Base) -> Names | None:
    """Those of a base in files that may be quantised."""
    if base.files is None or not base.files.is_quantised:
        return None
    model = skeleton(base.config)
    return None if model is None else Names(base.files, model)


def _matrix(path: str, adapter: Adapter, base: Base, names: Names | None) -> Tensor | None:
    """W0 [out, in] as it is stored; of codes, what they stand for. None if it is neither."""
    if names is not None:
        codes = codes_of(names.checkpoint, names.path_in_files(path))
        if codes is not None:
            return codes.dequantise(0, codes.out_features)
    weight = base.weight(path, adapter.modules[path])
    return weight.matrix if isinstance(weight, Dense) else None
