"""Base model, tokenizer and adapter of the fine-tune and benchmark scripts."""

import tempfile
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dora_peft import DoraConfig
from finetune.arguments import ModelArguments


def load_tokenizer(model: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model; without a padding token it pads with the end-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, gguf_file=model.gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model in `dtype`, its linear layers in nf4 if asked for.

    Raises:
        ValueError: if the tokenizer knows more tokens than the model has embeddings.
    """
    name = model.model_name_or_path
    if not model.load_in_4bit:
        base = load_dense(model)
    elif model.gguf_file is None:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype, quantization_config=nf4(model))
    else:
        # transformers quantises no model while it unpacks a GGUF file, so the unpacked one takes a way round.
        with tempfile.TemporaryDirectory() as folder:
            load_dense(model).save_pretrained(folder)
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, quantization_config=nf4(model))
        base.name_or_path = base.config._name_or_path = name
    num_embeddings = base.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings} embeddings; call "
            "model.resize_token_embeddings and save both."
        )
    return base


def load_dense(model: ModelArguments) -> PreTrainedModel:
    """The base model with every weight in `dtype`."""
    options: dict[str, Any] = {"dtype": model.dtype, "gguf_file": model.gguf_file}
    if model.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Older releases always unpack; newer ones may keep the weights packed, and then Trainer refuses the model.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **options)


def nf4(model: ModelArguments) -> BitsAndBytesConfig:
    """QLoRA's quantisation, with products in `dtype`, or in bfloat16 if that is auto."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype),
    )


def adapter_config(model: ModelArguments) -> PeftConfig:
    """The PEFT configuration of `method`, which is any but `full`."""
    shared = {
        "task_type": "CAUSAL_LM",
        "r": model.r,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "target_modules": model.target_modules,
        "exclude_modules": model.exclude_modules,
        "use_rslora": model.use_rslora,
        "init_lora_weights": initialisation(model.init_lora_weights),
    }
    if model.method == "dora":
        return DoraConfig(
            **shared,
            detach_norm=model.detach_norm,
            dropout_mode=model.dropout_mode,
            magnitude_only_modules=model.magnitude_only_modules,
        )
    return LoraConfig(**shared, use_dora=model.method == "peft_dora")


def initialisation(name: str) -> bool | str:
    """PEFT's `init_lora_weights`, which is a name or a truth value."""
    return {"true": True, "false": False}.get(name.lower(), name)


def build_model(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The base model, with the adapter of `method` unless that is `full`; torch's seed decides on A."""
    base = load_base_model(model, tokenizer)
    return base if model.method == "full" else get_peft_model(base, adapter_config(model))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable parameters and of all parameters, as PEFT counts them: 4-bit weights one by one."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
