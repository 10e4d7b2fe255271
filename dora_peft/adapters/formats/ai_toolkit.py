"""ai-toolkit's files: s = 1, so that it is folded into B.

<path>.lora_A.weight     A [r, in]
<path>.lora_B.weight     s B [out, r]
<path>.magnitude         m [out]
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
    for key, tensor in source.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnreadableError(
                f"'{source.path}': '{key}' is no key of this format: expected lora_A.weight, lora_B.weight and "
                "magnitude of each module."
            )
        found.setdefault(match["path"], {})[_PARTS[match["part"]]] = tensor
    modules = {}
    for path, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise UnreadableError(f"Module '{path}' has no {'lora_B' if 'A' in parts else 'lora_A'}.")
        magnitude = parts["m"].flatten() if "m" in parts else None
        modules[path] = Module(parts["A"], parts["B"], float(len(parts["A"])), magnitude)
    return Adapter(modules)


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
