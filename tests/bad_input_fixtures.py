"""A tiny Llama, a saved adapter of it, and that nothing of a failed change stays behind."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, DoraLayer

IDS = torch.arange(12).view(2, 6)


def llama(hidden_size=16):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()


def config(**options):
    return DoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))


def adapted(seed=1, **options):
    base = llama()
    torch.manual_seed(seed)
    return get_peft_model(base, config(**options)).eval()


@torch.no_grad()
def output(model):
    return model(IDS).logits


def check_untouched(base):
    """No adapter, no trace of one, the weights and what is trainable as at first."""
    fresh, state = llama().state_dict(), base.state_dict()
    assert not any(isinstance(m, DoraLayer) for m in base.modules())
    assert "peft_config" not in vars(base)
    assert state.keys() == fresh.keys()
    assert all(torch.equal(state[k], v) for k, v in fresh.items())
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == []


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}
