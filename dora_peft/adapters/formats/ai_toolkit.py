"""ai-toolkit's files: s = 1, so that it is folded into B.

<path>.lora_A.weight     A [r, in]
<path>.lora_B.weight     s B [out, r]
<path>.magnitude         m [out]

Its own files have a part of a pipeline before each path, which is taken off: "diffusion_model.", and "transformer." if
the base says that its paths do not begin so, as those of GPT-2 do.
"""

from __future__ import annotations

import re

import torch

from .adapter import Adapter, UnreadableError, check_holds
from .base import Base
from .files import Files
from .parts import gather, make_module, rank_of
from .source import Source

_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "magnitude": "m"}
_KEY = re.compile(r"(?P<path>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|magnitude)")


def recognises(source: Source) -> bool:
    keys = source.tensors
    return any(key.endswith(".magnitude") and f"{key.removesuffix('magnitude')}lora_A.weight" in keys for key in keys)


def read(source: Source, base: Base | None) -> Adapter:
    known = set(base.paths()) if base else set()

    def told(key: str) -> tuple[str, str] | None:
        match = _KEY.fullmatch(key)
        return None if match is None else (_own_path(match["path"], known), _PARTS[match["part"]])

    found, others = gather(source.tensors, told)
    if others:
        raise UnreadableError(
            f"'{source.path}': '{others[0]}' is no key of this format: expected lora_A.weight, lora_B.weight and "
            "magnitude of each module."
        )
    # s = 1
    return Adapter({path: make_module(path, parts, rank_of(parts)) for path, parts in found.items()})


def _own_path(path: str, known: set[str]) -> str:
    """A module's path in the base, from that in a pipeline."""
    path = path.removeprefix("diffusion_model.")
    short = path.removeprefix("transformer.")
    return short if short in known and path not in known else path


def write(adapter: Adapter, base: Base | None) -> Files:
    check_holds(adapter, "ai-toolkit", convolutions=True)
    tensors = {}
    for path, module in adapter.modules.items():
        tensors[f"{path}.lora_A.weight"] = module.lora_A
        folded = module.lora_B.to(torch.float64) * module.scaling
        tensors[f"{path}.lora_B.weight"] = folded.to(module.lora_B.dtype)
        if module.magnitude is not None:
            tensors[f"{path}.magnitude"] = module.magnitude
    return Files("adapter_model.safetensors", tensors, {"format": "pt"})
