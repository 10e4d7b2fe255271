"""Small models as llama.cpp's files, written with its own package and its converter's rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from format_fixtures import shaken
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig

HEADS = {"attn_q": 4, "attn_k": 2}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


def llama(tied: bool = False) -> LlamaForCausalLM:
    """Two blocks whose rows end on blocks of 32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def qwen() -> Qwen2ForCausalLM:
    """Two blocks with biases in q, k and v; its head is tied."""
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def other(kind: str, **more: object) -> PreTrainedModel:
    """A model of another type of transformers'."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(std=0.1)
    return model


def mixed(name: str) -> str:
    """Types as llama.cpp mixes them: q in 8 bits, v in 16, the table in 8, other matrices in 4."""
    return {"attn_q": "Q8_0", "attn_v": "F16", "token_embd": "Q8_0", "attn_output": "BF16"}.get(
        name.split(".")[-2], "Q4_0"
    )


def save_gguf(
    model: PreTrainedModel, path: Path, kind: str | Callable[[str], str] = mixed, architecture: str = "llama"
) -> Path:
    """Write a model; vectors are fp32.

    Args:
        model: Of transformers.
        path: The file.
        kind: The type of matrices, or of each by its name in the file.
        architecture: What llama.cpp calls it.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture != "gpt2":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        if architecture.startswith(("gemma", "qwen3")):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    # transformers' default is beyond the table
    writer.add_pad_token_id(0)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(config.vocab_size)])
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, (".weight", ".bias"))
        assert name is not None, key
        part = name.split(".")[-2]
        if architecture == "llama" and part in HEADS:
            value = value.unflatten(0, (HEADS[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        if architecture.startswith("gemma") and "norm" in name:
            value = value + 1
        if isinstance(model.get_submodule(key.rpartition(".")[0]), Conv1D) and key.endswith("weight"):
            value = value.t()
        wanted = "F32" if value.dim() == 1 else kind if isinstance(kind, str) else kind(name)
        kept = gguf.GGMLQuantizationType[wanted]
        writer.add_tensor(name, gguf.quants.quantize(value.contiguous().numpy(), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path: Path) -> nn.Module:
    """What transformers makes of a file, in fp32."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def trained(path: Path, folder: Path, **options: object) -> Path:
    """An adapter of ours over a .gguf, as after training."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    model = shaken(get_peft_model(loaded(path), DoraConfig(**options)))
    with warnings.catch_warnings():
        # PEFT looks for a config.json beside the file
        warnings.filterwarnings("ignore", message="Could not find a config file")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(folder)
    return folder
