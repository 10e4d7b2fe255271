"""Rows of q and k in torchtune's order, in its own keys and as it exports them to PEFT's."""

from dataclasses import replace

import pytest
import torch
from format_fixtures import HEADS, adapter, base_for
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dora_peft.adapters.formats import FORMATS, Adapter, Base, UnreadableError, read_source, write_files
from dora_peft.adapters.formats.torchtune import heads_of, interleaved

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")


def test_interleaved_rows_are_turned_as_pairs_of_neighbours():
    """Turning features 2 i and 2 i + 1 of what torchtune computes is transformers' turning of its own order."""
    size, length = 8, 5
    x = torch.randn(1, 1, length, size)
    position = torch.arange(length)[None]
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size)
    cos, sin = LlamaRotaryEmbedding(config)(x, position)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    theirs = interleaved(x[0, 0].T, 1, to_torchtune=True).T
    angles = position[0, :, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    even, odd = theirs[:, ::2], theirs[:, 1::2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1)
    found = interleaved(turned.flatten(1).T, 1, to_torchtune=False).T
    torch.testing.assert_close(found, expected[0, 0], rtol=1e-5, atol=1e-5)


def test_what_it_exports_has_magnitudes_in_its_own_order(tmp_path):
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    exported = {
        path: replace(m, magnitude=interleaved(m.magnitude, heads, to_torchtune=True))
        if (heads := heads_of(path, base, m.out_features))
        else m
        for path, m in made.modules.items()
    }
    assert not torch.equal(exported[Q].magnitude, made.modules[Q].magnitude)
    write_files(FORMATS["peft"].write(Adapter(exported), base), tmp_path / "adapter")
    found = FORMATS["torchtune"].read(read_source(tmp_path / "adapter"), base)
    for path, one in found.modules.items():
        assert torch.equal(one.magnitude, made.modules[path].magnitude)
        assert torch.equal(one.lora_B, made.modules[path].lora_B)


def test_heads_of_q_and_of_k():
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    assert heads_of(Q, base, 12) == HEADS["num_attention_heads"]
    assert heads_of(K, base, 6) == HEADS["num_key_value_heads"]
    assert heads_of("model.layers.0.mlp.down_proj", base, 12) is None
    base.config = {"model_type": "llama"}
    with pytest.raises(UnreadableError, match=r"no number of heads.*num_attention_heads and num_key_value_heads"):
        FORMATS["torchtune"].write(made, base)


def test_rows_of_qwen2_stay_where_they_are_and_others_are_refused():
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    base.config["model_type"] = "qwen2"
    tensors = FORMATS["torchtune"].write(made, base).tensors
    assert torch.equal(tensors["layers.0.attn.q_proj.lora_b.weight"], made.modules[Q].lora_B)
    assert torch.equal(tensors["layers.0.attn.q_proj.magnitude"], made.modules[Q].magnitude)
    base.config["model_type"] = "gpt_neox"
    with pytest.raises(
        UnreadableError, match="gives a 'gpt_neox': expected a base of model_type llama, mistral, qwen2"
    ):
        FORMATS["torchtune"].write(made, base)


@pytest.mark.parametrize("path", ["model.layers.0.mlp.experts.0", "transformer.h.0.attn.c_attn"])
def test_modules_of_other_models_are_refused_by_name(path):
    made = adapter(5, 3, 2.0)
    made.modules[path] = made.modules.pop(Q)
    with pytest.raises(UnreadableError, match=f"torchtune has no name for module '{path}'"):
        FORMATS["torchtune"].write(made, Base(base_for(made)))
