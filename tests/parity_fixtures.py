"""Small models of several architectures, adapted by this package and by PEFT alike."""

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

VOCABULARY = 48


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class ConvNet1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, bias=False)
        self.second = nn.Conv1d(8, 6, 2)

    def forward(self, x):
        return self.second(torch.relu_(self.first(x))).mean(2)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, 6)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)).mean(1))


def llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return GPT2LMHeadModel(config)


def opt():
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        dropout=0,
    )
    return OPTForCausalLM(config)


def bart():
    config = BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def tokens():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def language_inputs():
    return {"input_ids": tokens(), "labels": tokens()}


def image_inputs():
    return {"x": torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


def signal_inputs():
    return {"x": torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


MODELS = {
    "llama": (llama, language_inputs, {"target_modules": "all-linear"}),
    "gpt2": (gpt2, language_inputs, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "opt": (opt, language_inputs, {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    "bart": (bart, language_inputs, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    "conv2d": (ConvNet, image_inputs, {"target_modules": ["first", "second", "head"]}),
    "conv1d": (ConvNet1d, signal_inputs, {"target_modules": ["first", "second"]}),
    "embedding": (Embedder, lambda: {"ids": tokens()}, {"target_modules": ["embed", "head"]}),
}


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def outputs(model, kind):
    result = model(**MODELS[kind][1]())
    return result.logits if hasattr(result, "logits") else result


def loss_of(model, kind):
    result = model(**MODELS[kind][1]())
    return result.loss if hasattr(result, "loss") else result.square().mean()


def same_tensors(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
