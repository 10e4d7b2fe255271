"""VL-BART: BART whose encoder reads the features of a picture before the words of a question.

    model = VlBartForConditionalGeneration.from_bart("facebook/bart-base", visual_dim=2048, visual_tokens=36)
    model(visual_features=features, input_ids=ids, attention_mask=mask, labels=labels).loss
    model.generate(visual_features=features, input_ids=ids, attention_mask=mask)

A model of transformers, saved and loaded like one; if this module is imported, `AutoModelForSeq2SeqLM` loads it too.
Features [batch, visual_tokens, visual_dim] are those of regions that a detector found, as in VL-T5, or plainly the
pixels of patches. They are projected to the width of the encoder, get an embedding of their place, and stand before the
text; both get BART's own position embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerBase,
)

# Widths of bart-base and of VL-T5's features; at laptop size every width is an eighth.
SIZES: dict[str, dict[str, int]] = {
    "full": {"d_model": 768, "ffn": 3072, "layers": 6, "heads": 12, "vocab_size": 50265, "visual_dim": 2048},
    "laptop": {"d_model": 96, "ffn": 384, "layers": 6, "heads": 12, "vocab_size": 6283, "visual_dim": 256},
    "toy": {"d_model": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64, "visual_dim": 12},
}


class VlBartConfig(BartConfig):
    """BartConfig with the shape of the visual features.

    Attributes:
        visual_dim: Features per visual token.
        visual_tokens: The most visual tokens per picture.
    """

    model_type = "vl_bart"
    visual_dim: int = 2048
    visual_tokens: int = 36


class VisualEmbedding(nn.Module):
    """Features [batch, tokens, visual_dim] to embeddings [batch, tokens, d_model]."""

    def __init__(self, config: VlBartConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.visual_dim, config.d_model)
        self.places = nn.Embedding(config.visual_tokens, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.shape[1]
        if tokens > self.places.num_embeddings or features.shape[2] != self.projection.in_features:
            raise ValueError(
                f"visual_features: expected at most {self.places.num_embeddings} tokens of "
                f"{self.projection.in_features} features, found the shape {list(features.shape)}; set visual_tokens "
                "and visual_dim in the configuration."
            )
        embedded = self.projection(features.to(self.projection.weight.dtype))
        return self.norm(embedded + self.places.weight[:tokens])


class VlBartForConditionalGeneration(BartForConditionalGeneration):
    """BART that answers in words what it is asked about a picture."""

    config_class = VlBartConfig

    def __init__(self, config: VlBartConfig) -> None:
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    @classmethod
    def from_bart(cls, name_or_path: str, visual_dim: int, visual_tokens: int) -> VlBartForConditionalGeneration:
        """A pretrained BART with a fresh visual embedding, and with its settings of generation.

        Raises:
            ValueError: the model is of another kind, or lacks weights.
        """
        if (kind := AutoConfig.from_pretrained(name_or_path).model_type) != "bart":
            raise ValueError(f"{name_or_path}: expected a model of type 'bart', found {kind!r}.")
        bart, info = BartForConditionalGeneration.from_pretrained(name_or_path, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name_or_path}: expected all weights of BART, found none for {missing[0]}.")
        settings = bart.config.to_dict() | {"visual_dim": visual_dim, "visual_tokens": visual_tokens}
        settings = {key: value for key, value in settings.items() if key not in ("model_type", "architectures")}
        model = cls(VlBartConfig(**settings))
        model.load_state_dict(bart.state_dict(), strict=False)
        # transformers keeps beams and forced tokens out of the config
        model.generation_config = bart.generation_config
        return model

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As BART's, with `visual_features` [batch, tokens, visual_dim] beside `input_ids` [batch, length]."""
        features = kwargs.pop("visual_features", None)
        if features is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        embeds, mask = self.join(features, input_ids, attention_mask)
        return super().forward(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As BART's, with `visual_features` as in `forward`."""
        features = kwargs.pop("visual_features", None)
        if features is None:
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        embeds, mask = self.join(features, input_ids, attention_mask)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def join(self, features: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings and attention mask of the visual tokens with the text behind them."""
        if input_ids is None:
            raise ValueError("visual_features: expected input_ids, the question about the picture, beside them.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        visual = self.visual_embedding(features)
        embedded = torch.cat([visual, self.get_input_embeddings()(input_ids)], dim=1)
        return embedded, torch.cat([attention_mask.new_ones(visual.shape[:2]), attention_mask], dim=1)


AutoConfig.register(VlBartConfig.model_type, VlBartConfig)
AutoModelForSeq2SeqLM.register(VlBartConfig, VlBartForConditionalGeneration)


def build_vl_bart(size: str) -> VlBartForConditionalGeneration:
    """A model with random weights: bart-base's widths with size "full", an eighth of them with "laptop", or "toy"."""
    shape = SIZES[size]
    torch.manual_seed(0)
    return VlBartForConditionalGeneration(
        VlBartConfig(
            vocab_size=shape["vocab_size"],
            d_model=shape["d_model"],
            encoder_layers=shape["layers"],
            decoder_layers=shape["layers"],
            encoder_attention_heads=shape["heads"],
            decoder_attention_heads=shape["heads"],
            encoder_ffn_dim=shape["ffn"],
            decoder_ffn_dim=shape["ffn"],
            visual_dim=shape["visual_dim"],
        )
    )


def build_small(
    tokenizer: PreTrainedTokenizerBase, d_model: int, layers: int, visual_dim: int, visual_tokens: int
) -> VlBartForConditionalGeneration:
    """A model to train from scratch, with 4 heads, for texts of this tokenizer's words; no token is forced."""
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ids |= {"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None}
    torch.manual_seed(0)
    return VlBartForConditionalGeneration(
        VlBartConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            d_model=d_model,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=4 * d_model,
            decoder_ffn_dim=4 * d_model,
            visual_dim=visual_dim,
            visual_tokens=visual_tokens,
            dropout=0.0,
            **ids,
        )
    )


def random_batch(
    config: VlBartConfig, batch: int, text_len: int, answer_len: int, device: torch.device
) -> dict[str, Tensor]:
    """Features, questions and answers of random content, as the arguments of the model."""
    first = max(config.bos_token_id or 0, config.eos_token_id or 0, config.pad_token_id or 0) + 1
    return {
        "visual_features": torch.randn(batch, config.visual_tokens, config.visual_dim, device=device),
        "input_ids": torch.randint(first, config.vocab_size, (batch, text_len), device=device),
        "attention_mask": torch.ones(batch, text_len, dtype=torch.int64, device=device),
        "labels": torch.randint(first, config.vocab_size, (batch, answer_len), device=device),
    }
