"""Base model, tokenizer and adapter of the fine-tune and benchmark scripts."""

from typing import Any

import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dora_peft import DoraConfig
from finetune.config import FinetuneConfig


def load_tokenizer(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model; without a padding token it pads with the end-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, gguf_file=config.gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model in `config.dtype`.

    Raises:
        ValueError: if the tokenizer knows more tokens than the model has embeddings.
    """
    options: dict[str, Any] = {"dtype": config.dtype, "gguf_file": config.gguf_file}
    if config.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Older releases always unpack; newer ones may keep the weights packed, and then Trainer refuses the model.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **options)
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"{config.model_name_or_path}: the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings} "
            "embeddings; call model.resize_token_embeddings and save both."
        )
    return model


def adapter_config(config: FinetuneConfig) -> PeftConfig:
    """The PEFT configuration of `config.method`, which is any method but `full`."""
    shared = {
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
    }
    if config.method == "dora":
        return DoraConfig(
            **shared,
            detach_norm=config.detach_norm,
            dropout_mode=config.dropout_mode,
            magnitude_only_modules=config.magnitude_only_modules,
        )
    return LoraConfig(**shared, use_dora=config.method == "peft_dora")


def build_model(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The base model, with the adapter of `config.method` unless that is `full`; torch's seed decides on A."""
    model = load_base_model(config, tokenizer)
    return model if config.method == "full" else get_peft_model(model, adapter_config(config))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable parameters and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
