"""mlx-lm's folders: adapters.safetensors and an adapter_config.json of its own.

    <path>.lora_a     A^T [in, r]
    <path>.lora_b     B^T [r, out]
    <path>.m          m [out]

One rank and one s for all: lora_parameters.rank and .scale. Modules are named as in the blocks (self_attn.q_proj).
"""

from __future__ import annotations

import re

from torch import Tensor

from .adapter import Adapter, Module, UnreadableError, check_holds, one_rank
from .base import Base
from .files import Files
from .source import CONFIG, Source

_PARTS = {"lora_a": "A", "lora_b": "B", "m": "m"}
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_BLOCK = re.compile(r"^(?:.*\.)?layers\.\d+\.")


def recognises(source: Source) -> bool:
    return any(key.endswith(".lora_a") for key in source.tensors)


def read(source: Source, base: Base | None) -> Adapter:
    parameters = (source.config or {}).get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise UnreadableError(
            f"'{source.path}' has mlx-lm's keys, whose scale stands in {CONFIG} under lora_parameters, found "
            f"{scale!r}. Put the file back."
        )
    found: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in source.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            found.setdefault(match["path"], {})[_PARTS[match["part"]]] = tensor
    modules = {}
    for path, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise UnreadableError(f"Module '{path}' has no {'lora_b' if 'A' in parts else 'lora_a'}.")
        if "embed" in path.rpartition(".")[2] and "m" in parts:
            raise UnreadableError(
                f"Module '{path}' is an embedding, whose norm mlx-lm takes per token: no DoRA per output row."
            )
        modules[path] = Module(parts["A"].T, parts["B"].T, scale * parts["A"].shape[1], parts.get("m"))
    name = (source.config or {}).get("model")
    return Adapter(modules, others, base=name if isinstance(name, str) else None)


def write(adapter: Adapter, base: Base | None) -> Files:
    check_holds(adapter, "mlx")
    rank, alpha = one_rank(adapter, "mlx")
    tensors, names = {}, set()
    for path, module in adapter.modules.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = module.lora_A.T, module.lora_B.T
        if module.magnitude is not None:
            tensors[f"{path}.m"] = module.magnitude
        names.add(_BLOCK.sub("", path))
    kinds = {module.magnitude is None for module in adapter.modules.values()}
    if len(kinds) > 1:
        raise UnreadableError("mlx has magnitudes in all modules or in none, and this adapter has them in some.")
    config: dict[str, object] = {
        "fine_tune_type": "lora" if kinds == {True} else "dora",
        "model": adapter.base,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": sorted(names)},
    }
    return Files("adapters.safetensors", tensors, {"format": "mlx"}, {CONFIG: config})
