"""Adapters in the formats of other tools, read into and written from one form, `adapter.Adapter`.

source.py      files, found and read          files.py       files, written
adapter.py     the one form                   base.py        W0 of the base, where a format needs it, of checkpoint.py
peft_keys.py   peft, nvlabs, trtllm           lycoris.py     lycoris, onetrainer, comfyui-2026; refit.py other norms
ai_toolkit.py, mlx.py, torchtune.py           their own
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import ai_toolkit, lycoris, mlx, peft_keys, torchtune
from .adapter import Adapter, Module, UnreadableError
from .base import Base
from .checkpoint import Checkpoint
from .files import Files, write_files
from .source import Source, read_source

__all__ = [
    "FORMATS",
    "Adapter",
    "Base",
    "Checkpoint",
    "Files",
    "Format",
    "Module",
    "UnreadableError",
    "format_of",
    "read_source",
    "write_files",
]


@dataclass(frozen=True)
class Format:
    """How one tool's adapters are told, read and written.

    Attributes:
        recognises: Whether a file's keys are this format's; None if they are another's, so that it has to be named.
    """

    recognises: Callable[[Source], bool] | None
    read: Callable[[Source, Base | None], Adapter]
    write: Callable[[Adapter, Base | None], Files]


FORMATS = {
    "peft": Format(peft_keys.is_peft, peft_keys.read, peft_keys.write),
    "nvlabs": Format(peft_keys.is_nvlabs, peft_keys.read_nvlabs, peft_keys.write_nvlabs),
    "lycoris": Format(lycoris.recognises, lycoris.read, lycoris.write),
    "onetrainer": Format(None, lycoris.read, lycoris.write_onetrainer),
    "ai-toolkit": Format(ai_toolkit.recognises, ai_toolkit.read, ai_toolkit.write),
    "mlx": Format(mlx.recognises, mlx.read, mlx.write),
    "torchtune": Format(torchtune.recognises, torchtune.read, torchtune.write),
    "trtllm": Format(None, peft_keys.read_trtllm, peft_keys.write_trtllm),
    "comfyui-2026": Format(None, lycoris.read_comfyui, lycoris.write_comfyui),
}


def format_of(source: Source) -> str:
    """The name of the format that a file's keys are of.

    Raises:
        UnreadableError: They are of none, or of more than one.
    """
    found = [name for name, one in FORMATS.items() if one.recognises is not None and one.recognises(source)]
    # both have lora_A and lora_B, and only one of them a magnitude of this name
    found = ["ai-toolkit"] if found == ["peft", "ai-toolkit"] else found
    if len(found) == 1:
        return found[0]
    keys = ", ".join(list(source.tensors)[:3])
    what = f"those of {' and '.join(found)}" if found else "no known adapter's"
    raise UnreadableError(f"'{source.path}': its keys are {what} ({keys}, ...): expected one of {', '.join(FORMATS)}.")
