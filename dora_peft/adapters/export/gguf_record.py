"""Whether a .gguf is the base that adapters were trained over, by what their folders say."""

from __future__ import annotations

from collections.abc import Mapping

from ..formats import UnreadableError
from .adapted import AdaptedBase
from .codes.gguf_file import FLOATS
from .gguf_checkpoint import GgufCheckpoint


def check_record(adapted: AdaptedBase) -> None:
    """See that adapters over a .gguf were not trained over weights that another method quantised.

    Raises:
        UnreadableError: They were.
    """
    method = None if adapted.record is None else adapted.record.get("quant_method")
    if adapted.record is not None and method != "gguf":
        raise UnreadableError(
            f"The adapter was trained over a base quantised by {str(method)[:40]}, and '{adapted.checkpoint.name}' is "
            "quantised otherwise: name that base, or pass --base-quantization none to take this one as it is."
        )


def other_base(adapted: AdaptedBase) -> str | None:
    """How the base of training differs from a .gguf, as the folders say; None if not, or if the caller says."""
    checkpoint = adapted.checkpoint
    if not isinstance(checkpoint, GgufCheckpoint) or adapted.unrecorded or adapted.told:
        return None
    record: Mapping[str, object] = adapted.record or {}
    name = record.get("gguf_file")
    if record and (name is None or name == checkpoint.file.path.name):
        return None
    kinds = {checkpoint.kind(adapted.names.keys(f"{path}.weight")[0]) for path in adapted.layers}
    if not record and kinds <= set(FLOATS):
        return None
    over = f"over '{name}'" if record else "over a base that was not quantised"
    return f"the adapter was trained {over}, and '{checkpoint.file.path.name}' holds {', '.join(sorted(kinds))}"
