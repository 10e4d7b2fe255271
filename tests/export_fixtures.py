"""Small models of several kinds for the tests of exports."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def qwen(tied: bool = False) -> Qwen2ForCausalLM:
    """Two blocks with biases in q, k and v."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, vocab_size=32, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def gpt2() -> GPT2LMHeadModel:
    """One block, whose linear layers are stored the other way round; its head is tied to its table."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16)).eval()


def wide_llama() -> LlamaForCausalLM:
    """Two blocks whose rows end on bitsandbytes' blocks of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=32, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def outputs(folder: Path, route: str, base: Path | None = None) -> Tensor:
    """The logits of what a route wrote, without this package."""
    name = {"exact": "base", "merged": ""}.get(route)
    model = AutoModelForCausalLM.from_pretrained(base if name is None else folder / name, device_map="cpu")
    if route != "merged":
        model = PeftModel.from_pretrained(model, folder / "adapter" if route == "exact" else folder)
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None]).logits.float()
