"""torchtune's adapters: its own names of modules, and rows of q and k in another order.

    layers.<i>.attn.q_proj.lora_a.weight     A [r, in]
    layers.<i>.attn.q_proj.lora_b.weight     B [out, r]
    layers.<i>.attn.q_proj.magnitude         m [out]

Its rotary embedding turns neighbouring features of a head, transformers' the first half against the second: each head's
rows of q and k are interleaved, in B and in m. Its own exporter to PEFT's keys brings B back, and leaves m as it is:
such folders are read too, if they are said to be of torchtune.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from . import peft_keys
from .adapter import Adapter, Module, UnreadableError, check_holds, one_rank
from .base import Base
from .files import Files
from .parts import gather, make_module, number
from .source import CONFIG, Source

_PARTS = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "m"}
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
NAMES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")
# By transformers' model_type: whether torchtune orders the rows of q and k otherwise.
ORDERED = {"llama": True, "mistral": True, "qwen2": False}
_OF_HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


def recognises(source: Source) -> bool:
    return any(key.endswith(".lora_a.weight") for key in source.tensors)


def read(source: Source, base: Base | None) -> Adapter:
    """An adapter of torchtune's, in its own keys or as it exports them; heads come from the base's config."""
    if peft_keys.is_peft(source):
        adapter = peft_keys.read(source, base)
        for path, module in adapter.modules.items():
            turned = _reordered(path, module, base, to_torchtune=False)
            adapter.modules[path] = replace(module, magnitude=turned.magnitude)
        return adapter
    config = source.config or {}
    rank, alpha = config.get("r"), number(config.get("lora_alpha"), f"'{source.path}': lora_alpha in {CONFIG}")

    def told(key: str) -> tuple[str, str] | None:
        match = _KEY.fullmatch(key)
        return None if match is None else (_to_transformers(match["path"]), _PARTS[match["part"]])

    found, others = gather(source.tensors, told)
    if others:
        raise UnreadableError(f"'{source.path}': '{others[0]}' is no key of a torchtune adapter.")
    modules = {}
    for path, parts in found.items():
        module = make_module(path, parts, alpha)
        if module.rank != rank:
            raise UnreadableError(
                f"Module '{path}' has rank {module.rank}, and r in {CONFIG} is {str(rank)[:40]}: expected them to be "
                "equal. Restore the config that was saved with the tensors."
            )
        modules[path] = _reordered(path, module, base, to_torchtune=False)
    return Adapter(modules)


def write(adapter: Adapter, base: Base | None) -> Files:
    check_holds(adapter, "torchtune")
    rank, alpha = one_rank(adapter, "torchtune")
    tensors = {}
    for path, module in adapter.modules.items():
        own, module = _from_transformers(path), _reordered(path, module, base, to_torchtune=True)
        tensors[f"{own}.lora_a.weight"], tensors[f"{own}.lora_b.weight"] = module.lora_A, module.lora_B
        if module.magnitude is not None:
            tensors[f"{own}.magnitude"] = module.magnitude
    config: dict[str, object] = {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": adapter.base}
    return Files("adapter_model.safetensors", tensors, {"format": "pt"}, {CONFIG: config})


def _to_transformers(own: str) -> str:
    match = _BLOCK.fullmatch(own)
    if match and match[2] in NAMES:
        return f"model.layers.{match[1]}.{NAMES[match[2]]}"
    if own == "output":
        return "lm_head"
    raise UnreadableError(f"torchtune's module '{own}' has no known name in transformers: expected those of a LLaMA.")


def _from_transformers(path: str) -> str:
    match = _BLOCK.fullmatch(path.removeprefix("model."))
    for own, name in NAMES.items():
        if match and match[2] == name:
            return f"layers.{match[1]}.{own}"
    if path == "lm_head":
        return "output"
    raise UnreadableError(f"torchtune has no name for module '{path}': expected those of a LLaMA.")


def heads_of(path: str, base: Base, rows: int) -> int | None:
    """The heads whose rows torchtune orders otherwise, None if `path` is no q or k, or the base does not say."""
    match = _BLOCK.fullmatch(path.removeprefix("model."))
    entry = _OF_HEADS.get(match[2]) if match else None
    if entry is None:
        return None
    if not ORDERED.get(str(base.config.get("model_type")), False):
        return None
    heads = base.config.get(entry, base.config.get("num_attention_heads"))
    return heads if isinstance(heads, int) and heads > 0 and rows % (2 * heads) == 0 else None


def interleaved(tensor: Tensor, heads: int, *, to_torchtune: bool) -> Tensor:
    """The rows of q or k, [out, ...], in torchtune's order, or back in transformers'."""
    shape = (heads, 2, -1) if to_torchtune else (heads, -1, 2)
    return tensor.unflatten(0, shape).transpose(1, 2).flatten(0, 2)


def _reordered(path: str, module: Module, base: Base | None, *, to_torchtune: bool) -> Module:
    """The module with its output rows in the other order, if it is a q or k."""
    if not path.endswith(tuple(_OF_HEADS)):
        return module
    if base is None:
        raise UnreadableError(
            f"torchtune orders the rows of '{path}' by heads: name the base with --base, whose config has their number."
        )
    kind = str(base.config.get("model_type"))
    if kind not in ORDERED:
        raise UnreadableError(
            f"Nothing is known of the order of rows that torchtune gives a {kind[:40]!r}: expected a base of "
            f"model_type {', '.join(ORDERED)}."
        )
    if not ORDERED[kind]:
        return module
    heads = heads_of(path, base, module.out_features)
    if heads is None:
        raise UnreadableError(
            f"The config of '{base.name}' has no number of heads of an even size for the {module.out_features} rows of "
            f"'{path}': expected {' and '.join(_OF_HEADS.values())}."
        )
    lora_B = interleaved(module.lora_B, heads, to_torchtune=to_torchtune)
    m = None if module.magnitude is None else interleaved(module.magnitude, heads, to_torchtune=to_torchtune)
    return replace(module, lora_B=lora_B, magnitude=m)
