"""Random base models of true widths, which the contenders share."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder, from its config.json on the Hub."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    # hidden / heads if None
    head_dim: int | None = None
    tied: bool = False
    qwen3: bool = False

    def linears(self) -> list[tuple[int, int]]:
        """The distinct (in, out) of the linear layers of one decoder layer."""
        head_dim = self.head_dim or self.hidden // self.heads
        q, kv = self.heads * head_dim, self.kv_heads * head_dim
        h, i = self.hidden, self.intermediate
        return sorted({(h, q), (h, kv), (q, h), (h, i), (i, h)})


SHAPES = {
    "tiny": Shape(64, 96, 4, 2, 2, 128),
    "llama-512": Shape(512, 1376, 8, 8, 4, 2048),
    "llama-1024": Shape(1024, 2816, 16, 8, 4, 2048),
    "smollm2-135m": Shape(576, 1536, 9, 3, 30, 49152, tied=True),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 16, 128256, tied=True),
    "llama-3.2-3b": Shape(3072, 8192, 24, 8, 28, 128256, head_dim=128, tied=True),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32, 128256),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 36, 151936, head_dim=128, qwen3=True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_base(shape: Shape, layers: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A frozen causal language model of this shape with random weights."""
    config, model_class = _described(shape, layers, vocab)
    torch.manual_seed(seed)
    with torch.device(device):
        model = model_class(config)
    return model.to(dtype).requires_grad_(False)


def build_at_once(shape: Shape, layers: int, vocab: int, dtype: torch.dtype, seed: int) -> Any:
    """The same on the CPU with each weight made once, in its dtype: the heap is as after loading, without holes."""
    config, model_class = _described(shape, layers, vocab)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model: Any = model_class(config)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    weight = torch.empty(parameter.shape, dtype=dtype)
                    weight = weight.fill_(1) if weight.dim() < 2 else weight.uniform_(-0.03, 0.03, generator=generator)
                    made[parameter] = nn.Parameter(weight, requires_grad=False)
                module._parameters[name] = made[parameter]
    # its buffers are computed when it is made
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _described(shape: Shape, layers: int, vocab: int) -> tuple[Any, Any]:
    """The configuration and the class of a model."""
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if shape.qwen3 else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return config, model_class


class OneLinear(nn.Module):
    """A single linear layer as a model, for the suites that look at one layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def build_layer(in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, seed: int) -> OneLinear:
    """A frozen OneLinear whose weights have a decoder's size: standard deviation 0.02."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = OneLinear(in_features, out_features)
        nn.init.normal_(model.linear.weight, std=0.02)
    return model.to(dtype).requires_grad_(False)


def share_weights(base: nn.Module) -> nn.Module:
    """A copy of the modules of `base` around the same parameters and buffers."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]})
