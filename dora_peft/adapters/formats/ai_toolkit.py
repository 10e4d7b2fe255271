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
from torch import Tensor

from .adapter import Adapter, Module, UnreadableError, check_holds
from .base import Base
from .files import Files
from .source import Source

_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "magnitude": "m"}
_KEY = re.compile(r"(?P<path>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|magnitude)")


def recognises(source: Source) -> bool:
    keys = source.tensors
    return any(key.endswith(".magnitude") and f"{key.removesuffix('magnitude')}lora_A.weight" in keys for key in keys)


def read(source: Source, base: Base | None) -> Adapter:
    found: dict[str, dict[str, Tensor]] = {}
    known = set(base.paths()) if base else set()
    for key, tensor in source.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnreadableError(
                f"'{source.path}': '{key}' is no key of this format: expected lora_A.weight, lora_B.weight and "
                "magnitude of each module."
            )
        found.setdefault(_own_path(match["path"], known), {})[_PARTS[match["part"]]] = tensor
    modules = {}
    for path, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise UnreadableError(f"Module '{path}' has no {'lora_B' if 'A' in parts else 'lora_A'}.")
        magnitude = parts["m"].flatten() if "m" in parts else None
        modules[path] = Module(parts["A"], parts["B"], float(len(parts["A"])), magnitude)
    return Adapter(modules)


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
