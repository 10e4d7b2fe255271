"""PEFT's own folders, and those that share their keys: NVlabs' and the normalised ones of TensorRT-LLM.

    base_model.model.<path>.lora_A.weight                [r, in]
    base_model.model.<path>.lora_B.weight                [out, r]
    base_model.model.<path>.lora_magnitude_vector        m [out]; PEFT loads "....weight" too, transformers only that
    base_model.model.<path>.weight_m_wdecomp.weight      m [out, 1] in NVlabs' folders, instead

s = lora_alpha / r comes from adapter_config.json. TensorRT-LLM's engine multiplies each row of W0 + s B A by what it
finds as the magnitude: m / ||W0 + s B A||.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from peft.utils.other import get_pattern_key
from torch import Tensor

from ..._own_entries import LORA_FIELDS
from ...reference import alpha_divisor
from ..names import exactly
from .adapter import Adapter, Module, UnreadableError, check_layers, one_rank
from .base import Base
from .files import Files
from .parts import gather, make_module, number
from .source import CONFIG, Source

PREFIX = "base_model.model."
# Where diffusers keeps the config: in the file's head, its entries behind the model's part in a pipeline's file.
DIFFUSERS = "lora_adapter_metadata"
_PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
    "lora_magnitude_vector": "m", "weight_m_wdecomp": "m",
}  # fmt: skip
_EMBEDDING = re.compile(r"(?P<path>.+)\.lora_embedding_[AB]$")
_KEY = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(_PARTS)})(\.weight)?")


def is_nvlabs(source: Source) -> bool:
    return any(".weight_m_wdecomp" in key for key in source.tensors)


def is_peft(source: Source) -> bool:
    return not is_nvlabs(source) and any(_KEY.fullmatch(key) for key in source.tensors)


def read(source: Source, base: Base | None) -> Adapter:
    """An adapter in PEFT's keys, with either name of the magnitude."""
    config, prefix = _config(source)
    if config.get("peft_type", "LORA") not in ("LORA", "DORA"):
        raise UnreadableError(
            f"'{source.path}': {CONFIG} says peft_type {str(config['peft_type'])[:40]!r}, and only LORA and DORA are "
            "factors and magnitudes."
        )

    def told(key: str) -> tuple[str, str] | None:
        match = _KEY.fullmatch(key.removeprefix(PREFIX).removeprefix(prefix))
        return None if match is None else (match["path"], _PARTS[match["part"]])

    found, keys = gather(source.tensors, told)
    embeddings = {match["path"] for key in source.tensors if (match := _EMBEDDING.match(key.removeprefix(PREFIX)))}
    modules = {}
    for path, parts in found.items():
        rank, alpha = _of_config(path, config)
        module = make_module(path, parts, alpha, embedding=path in embeddings)
        if rank != module.rank:
            raise UnreadableError(
                f"Module '{path}' has rank {module.rank}, and {CONFIG} says {rank}: expected them to be equal, as s = "
                "lora_alpha / r needs the rank. Restore the config that was saved with the tensors."
            )
        modules[path] = module
    others = {key.removeprefix(PREFIX).removeprefix(prefix): source.tensors[key] for key in keys}
    base_name = config.get("base_model_name_or_path")
    return Adapter(modules, others, config, base_name if isinstance(base_name, str) else None)


def _config(source: Source) -> tuple[dict[str, object], str]:
    """The config beside a file or in its head, and what it and the keys begin with in files of diffusers' pipelines."""
    if source.config is not None:
        return dict(source.config), ""
    if DIFFUSERS not in source.metadata:
        raise UnreadableError(
            f"'{source.path}' has no {CONFIG} beside it, and its keys are PEFT's, whose scaling lora_alpha / r stands "
            "there. Put the file back."
        )
    try:
        config = dict(json.loads(source.metadata[DIFFUSERS]))
    except (ValueError, TypeError) as error:
        raise UnreadableError(f"'{source.path}': its metadata '{DIFFUSERS}' is damaged: {error}.") from error
    if "r" in config:
        return config, ""
    parts = sorted({name.partition(".")[0] for name in config})
    if len(parts) != 1:
        raise UnreadableError(
            f"'{source.path}' holds adapters of more than one model ({', '.join(parts) or 'none'}): other formats hold "
            "an adapter of one. Split the file first."
        )
    return {name.partition(".")[2]: value for name, value in config.items()}, f"{parts[0]}."


def _of_config(path: str, config: Mapping[str, object]) -> tuple[int, float]:
    """The rank of a module and its s r, as PEFT takes them from a config."""
    values = []
    for entry, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        own = config.get(patterns) or {}
        if not isinstance(own, dict):
            raise UnreadableError(f"{CONFIG}: {patterns} should be an object, found {str(own)[:60]!r}.")
        try:
            values.append(own.get(get_pattern_key(list(own), path), config.get(entry)))
        except re.error as error:
            raise UnreadableError(f"{CONFIG}: {patterns} holds no regular expression: {error}.") from error
    rank, alpha = values
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UnreadableError(f"{CONFIG}: r of '{path}' should be a positive integer, found {str(rank)[:40]}.")
    alpha = number(alpha, f"{CONFIG}: lora_alpha of '{path}'")
    # s r, where s = alpha / sqrt(r)
    return rank, alpha * rank / alpha_divisor(rank, True) if config.get("use_rslora") else alpha


def write(adapter: Adapter, base: Base | None, magnitude: str = "lora_magnitude_vector.weight") -> Files:
    """The adapter in PEFT's keys, with m as `magnitude` names it."""
    tensors = {}
    for path, module in adapter.modules.items():
        names = ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A.weight", "lora_B.weight")
        for name, factor in zip(names, (module.lora_A, module.lora_B), strict=True):
            tensors[f"{PREFIX}{path}.{name}"] = factor
        if module.magnitude is not None:
            key = f"{PREFIX}{path}.{magnitude}"
            tensors[key] = module.magnitude.view(_shape(module, key))
    tensors.update({f"{PREFIX}{key}": tensor for key, tensor in adapter.others.items()})
    return Files("adapter_model.safetensors", tensors, {"format": "pt"}, {CONFIG: config_of(adapter)})


def read_nvlabs(source: Source, base: Base | None) -> Adapter:
    """A folder of NVlabs' fork of PEFT, whose config has entries that PEFT does not know."""
    adapter = read(source, base)
    adapter.config = {name: value for name, value in adapter.config.items() if name in LORA_FIELDS}
    return adapter


def write_nvlabs(adapter: Adapter, base: Base | None) -> Files:
    """The adapter as NVlabs' fork of PEFT names its tensors; its config has one rank and one alpha for all."""
    check_layers(adapter, "nvlabs")
    rank, alpha = one_rank(adapter, "nvlabs")
    files = write(adapter, base, "weight_m_wdecomp.weight")
    config = {**files.json[CONFIG], "peft_type": "DORA", "r": rank, "lora_alpha": alpha}
    for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        config.pop(name, None)
    return replace(files, json={CONFIG: config})


def _shape(module: Module, key: str) -> tuple[int, ...]:
    """Of m: NVlabs' is a column, PEFT's that of the layer's output without the batch."""
    out = module.out_features
    if "wdecomp" in key:
        return (out, 1)
    return (1, out, *(1 for _ in module.lora_A.shape[2:])) if module.lora_A.dim() > 2 else (out,)


def config_of(adapter: Adapter) -> dict[str, object]:
    """The adapter_config.json: the one that was read, or one that says as much as the modules do."""
    has_magnitude = any(module.magnitude is not None for module in adapter.modules.values())
    if adapter.config:
        return {**adapter.config, "peft_type": "LORA", "use_dora": has_magnitude}
    (rank, alpha), _ = Counter((m.rank, m.alpha) for m in adapter.modules.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "use_dora": has_magnitude,
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(adapter.modules),
        "rank_pattern": {exactly(path): m.rank for path, m in adapter.modules.items() if m.rank != rank},
        "alpha_pattern": {exactly(path): m.alpha for path, m in adapter.modules.items() if m.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }


def read_trtllm(source: Source, base: Base | None) -> Adapter:
    """A folder whose magnitudes are m / ||W0 + s B A||."""
    adapter, weights = read(source, base), needed(base, "trtllm")
    return adapter.with_magnitudes(lambda path, module: times(module, lengths(weights, path, module, "trtllm")[1]))


def write_trtllm(adapter: Adapter, base: Base | None) -> Files:
    """A folder whose magnitudes are m / ||W0 + s B A||, as TensorRT-LLM's engine multiplies by them."""
    check_layers(adapter, "trtllm")
    weights = needed(base, "trtllm")
    normalised = adapter.with_magnitudes(
        lambda path, module: times(module, 1 / lengths(weights, path, module, "trtllm")[1])
    )
    return write(normalised, base, "lora_magnitude_vector")


def lengths(weights: Base, path: str, module: Module, name: str) -> tuple[Tensor, Tensor]:
    """||W0|| and ||W0 + s B A|| per output row, for a format that divides by one or both.

    Raises:
        UnreadableError: A row is zero.
    """
    before, composed = weights.norms(path, module)
    # only the one of ComfyUI divides by ||W0||
    divisors = (composed,) if name == "trtllm" else (before, composed)
    zero = sum(int((norms == 0).sum()) for norms in divisors)
    if zero:
        raise UnreadableError(
            f"{name} divides by the norms of the base's rows, and module '{path}' has {zero} rows of zeros. Leave the "
            "module out of the adapter, or merge it."
        )
    return before, composed


def times(module: Module, factor: Tensor) -> Tensor:
    """m times a factor in fp64 [out], rounded once."""
    assert module.magnitude is not None
    return (module.magnitude.double().cpu() * factor).to(module.magnitude.dtype)


def needed(base: Base | None, name: str) -> Base:
    if base is None:
        raise UnreadableError(f"{name} holds magnitudes in relation to the base's weights: name the base with --base.")
    return base
