"""A plain LoRA as llama.cpp's GGUF file, written with the package `gguf`.

llama.cpp names tensors in its own way (blk.0.attn_q.weight.lora_a), keeps the rows of LLaMA's q and k in the order of
its rotary embedding, and computes with alpha / rank. For architectures of which nothing else is known to differ; what
they give equals, tensor for tensor, what llama.cpp's own convert_lora_to_gguf.py makes of the folder for PEFT.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..._files import saving
from ..formats import Module, UnreadableError


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp calls one of transformers' model types, and whether it orders the rows of q and k anew."""

    name: str
    rotated: bool = False


# Those of which convert_lora_to_gguf.py of llama.cpp (2026-11) was seen to write the same.
ARCHITECTURES = {
    "llama": _Architecture("llama", rotated=True),
    "mistral": _Architecture("llama", rotated=True),
    "smollm3": _Architecture("smollm3", rotated=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "phi3": _Architecture("phi3"),
}
_TIED = ("token_embd.weight", "output.weight")


def write_gguf(
    modules: Mapping[str, Module],
    config: Mapping[str, object],
    out: str | os.PathLike[str],
    *,
    name: str = "",
    force: bool = False,
) -> Path:
    """Write llama.cpp's adapter, or nothing.

    Args:
        modules: Of one rank and dtype, with alpha = rank, as `plain_modules` gives them.
        config: The base's config.json.
        out: The file, which ends in ".gguf".
        name: What the file says of itself.
        force: Replace the file.

    Raises:
        UnreadableError: `gguf` is not installed, or llama.cpp has no place for a module; it is named.
        FileExistsError, ValueError: See `check_gguf`.
        NotSavedError: It cannot be written.
    """
    path = check_gguf(out, force=force)
    gguf = _gguf()
    tensors = llama_cpp_tensors(modules, config)
    with saving("the adapter", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        try:
            writer = gguf.GGUFWriter(staging / path.name, architecture(config).name)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, next(iter(modules.values())).alpha)
            if name:
                writer.add_name(name)
            for key, tensor in tensors.items():
                _add(gguf, writer, key, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(staging / path.name, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def check_gguf(out: str | os.PathLike[str], *, force: bool) -> Path:
    """Where the file may be written.

    Raises:
        UnreadableError: `gguf` is not installed.
        FileExistsError: Something is there, and `force` is not set or it is no GGUF file.
        ValueError: The name ends otherwise, or lies below a file.
    """
    _gguf()
    path = Path(out)
    if path.suffix != ".gguf":
        raise ValueError(f"'{path}': llama.cpp's adapter is one file: expected a name that ends in .gguf.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"'{path}' cannot be made: '{above}' is no folder. Choose another name.")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FileExistsError(f"'{path}' is no file. Choose another name.")
    if path.exists() and not force:
        raise FileExistsError(f"'{path}' is there already. Choose another name, or pass --force to replace it.")
    if path.exists() and not _is_gguf(path):
        raise FileExistsError(f"'{path}' is no GGUF file: --force replaces such a file alone. Choose another name.")
    return path


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def architecture(config: Mapping[str, object]) -> _Architecture:
    """What llama.cpp calls the base.

    Raises:
        UnreadableError: It is not known here.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnreadableError(
            f"--to gguf knows {', '.join(ARCHITECTURES)}, and the base's model_type is {kind[:40]!r}: write the folder "
            "for PEFT, and convert it by llama.cpp's convert_lora_to_gguf.py."
        )
    return ARCHITECTURES[kind]


def llama_cpp_tensors(modules: Mapping[str, Module], config: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of llama.cpp's adapter by their names.

    Args:
        modules: By path; linear layers and embeddings.
        config: The base's config.json.

    Raises:
        UnreadableError: llama.cpp has no place for a module, or its rows are no heads.
    """
    gguf, kind = _gguf(), architecture(config)
    arch, filled = _arch(gguf, kind.name), _filled(config)
    names = gguf.TensorNameMap(arch, filled.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for path, module in modules.items():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        # gemma3's embedding is cut to its tokenizer's length there
        if name is None or module.lora_A.dim() > 2 or (module.embedding and kind.name == "gemma3"):
            raise UnreadableError(f"llama.cpp's {kind.name} has no place for an adapter of module '{path}'.")
        if filled.tie_word_embeddings and name in _TIED:
            raise UnreadableError(
                f"llama.cpp has one tensor for the tied embedding and head, and computes no adapter of '{path}' with "
                "it. Leave the module out, or export with --as exact or merged."
            )
        lora_A, lora_B = module.lora_A, module.lora_B
        if kind.rotated and path.endswith((".q_proj", ".k_proj")):
            query = path.endswith(".q_proj")
            lora_B = _rotated(lora_B, filled.num_attention_heads if query else filled.num_key_value_heads, path)
        # rows are looked up by token
        found[f"{name}.lora_a"] = lora_A.T if module.embedding else lora_A
        found[f"{name}.lora_b"] = lora_B
    return found


def _rotated(lora_B: Tensor, heads: int, path: str) -> Tensor:
    """Rows of each head from (first halves, second halves) of the rotated pairs to pair by pair."""
    rows = len(lora_B)
    if rows % (2 * heads):
        raise UnreadableError(f"Module '{path}' has {rows} rows: expected pairs for each of {heads} heads.")
    return lora_B.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(lora_B.shape)


def _filled(config: Mapping[str, object]) -> PreTrainedConfig:
    """The config with what a config.json leaves out as its class has it."""
    try:
        return CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config))
    except Exception as error:
        # of as many kinds as there are models and entries
        said = str(error).strip().splitlines()
        raise UnreadableError(
            f"The base's config.json is damaged: {said[-1].strip() if said else type(error).__name__} Restore the file."
        ) from error


def _add(gguf: ModuleType, writer: object, key: str, tensor: Tensor) -> None:
    """One tensor; numpy has no bf16."""
    add = writer.add_tensor  # type: ignore[attr-defined]
    if tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        add(key, gguf.quants.quantize(tensor.float().contiguous().cpu().numpy(), kind), raw_dtype=kind)
    else:
        add(key, tensor.contiguous().cpu().numpy())


def _arch(gguf: ModuleType, name: str) -> object:
    for arch, known in gguf.MODEL_ARCH_NAMES.items():
        if known == name:
            return arch
    raise UnreadableError(f"The installed package gguf does not know llama.cpp's {name}: pip install --upgrade gguf.")


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UnreadableError("--to gguf needs the package gguf: pip install gguf.") from error
    return gguf
