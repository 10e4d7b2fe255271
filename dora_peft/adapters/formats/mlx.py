"""mlx-lm's folders: adapters.safetensors and an adapter_config.json of its own.

    <path>.lora_a     A^T [in, r]
    <path>.lora_b     B^T [r, out]
    <path>.m          m [out]

One rank and one s for all: lora_parameters.rank and .scale. Modules are named as in the blocks (self_attn.q_proj).
"""

from __future__ import annotations

import re

from .adapter import Adapter, UnreadableError, check_holds, one_rank
from .base import Base
from .files import Files
from .parts import gather, make_module, number, rank_of
from .source import CONFIG, Source

_PARTS = {"lora_a": "A", "lora_b": "B", "m": "m"}
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
# Names that are the same in transformers and mlx-lm.
_OURS = re.compile(r"model\.layers\.\d+\.|lm_head$")
_BLOCK = re.compile(r"^(?:.*\.)?layers\.\d+\.")


def recognises(source: Source) -> bool:
    return any(key.endswith(".lora_a") for key in source.tensors)


def read(source: Source, base: Base | None) -> Adapter:
    parameters = (source.config or {}).get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    scale = number(scale, f"'{source.path}' has mlx-lm's keys, whose scale in {CONFIG} under lora_parameters")

    def told(key: str) -> tuple[str, str] | None:
        match = _KEY.fullmatch(key)
        return None if match is None else (match["path"], _PARTS[match["part"]])

    found, others = gather(source.tensors, told)
    if others:
        raise UnreadableError(
            f"'{source.path}': '{others[0]}' is no part of an adapter of mlx-lm: expected lora_a, lora_b and m of each "
            "module. Save the adapter without what else was trained."
        )
    modules = {}
    for path, parts in found.items():
        if "embed" in path.rpartition(".")[2] and "m" in parts:
            raise UnreadableError(
                f"Module '{path}' is an embedding, whose norm mlx-lm takes per token: no DoRA per output row."
            )
        # stored the other way round; one that is no matrix is named by the check
        parts = {name: tensor.T if name != "m" and tensor.dim() == 2 else tensor for name, tensor in parts.items()}
        modules[path] = make_module(path, parts, scale * rank_of(parts))
    name = (source.config or {}).get("model")
    return Adapter(modules, base=name if isinstance(name, str) else None)


def write(adapter: Adapter, base: Base | None) -> Files:
    check_holds(adapter, "mlx")
    rank, alpha = one_rank(adapter, "mlx")
    tensors, names = {}, set()
    for path, module in adapter.modules.items():
        if not _OURS.match(path):
            raise UnreadableError(
                f"mlx-lm may name module '{path}' otherwise: expected those of models whose blocks are model.layers."
            )
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
