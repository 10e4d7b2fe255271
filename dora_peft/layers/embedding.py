"""DoRA on nn.Embedding: `out` is the embedding dimension, norms run over the vocabulary, no dropout."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from ..ops.compose import embedding_branch
from .kind import ComputingLayer, Kind
from .layer import DoraLayer


class EmbeddingKind(Kind):
    """How embeddings differ from the other kinds."""

    drops = False
    calls = False

    def multiplies(self, base: nn.Module, forward: object) -> bool:
        # with max_norm it writes to its weight
        return forward is nn.Embedding.forward and getattr(base, "max_norm", None) is None

    def multiply(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        table = cast(nn.Embedding, base)
        return F.embedding(x, weight, table.padding_idx, None, 2.0, table.scale_grad_by_freq, table.sparse)

    def low_rank(self, layer: ComputingLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        table = cast(nn.Embedding, layer.get_base_layer())
        return embedding_branch(
            x,
            lora_A,
            lora_B,
            scaling,
            embed_scale=layer._get_embed_scale(),
            padding_idx=table.padding_idx,
            scale_grad_by_freq=table.scale_grad_by_freq,
            sparse=table.sparse,
        )

    def matrix(self, base: nn.Module, weight: Tensor) -> Tensor:
        return weight.T

    def in_layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T


class Embedding(DoraLayer, nn.Module):
    """DoRA on an embedding."""

    peft_layer = lora.Embedding
    kind: Kind = EmbeddingKind()

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]:
        return self.lora_embedding_A, self.lora_embedding_B

    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
