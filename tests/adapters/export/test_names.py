"""Parameters of models by the keys of their files: what transformers saves, as it loads it."""

import json
import shutil

import pytest
import torch
from export_fixtures import gpt2, qwen
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from dora_peft.adapters.export.names import Names
from dora_peft.adapters.formats import Checkpoint, UnreadableError
from dora_peft.adapters.formats.base import skeleton

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32,
}  # fmt: skip


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


def llava(tied=False):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied))


def qwen_vl():
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"type": "default", "mrope_section": [1, 1, 2]}
    text = {**SIZES, "rope_scaling": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def t5():
    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32))


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "without a head": lambda: qwen().model,
    "tied": lambda: qwen(tied=True), "gpt2": gpt2, "mixtral": mixtral, "llava": llava, "qwen-vl": qwen_vl, "t5": t5,
}  # fmt: skip


def stored(model, folder):
    """A model's files, and the names that they have for its parameters."""
    model.save_pretrained(folder)
    checkpoint = Checkpoint(folder)
    return Names(checkpoint, skeleton(checkpoint.config))


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def test_each_parameter_is_read_and_written_under_the_keys_it_came_from(tmp_path, model):
    names = stored(model, tmp_path)
    files, parameters = load_file(tmp_path / "model.safetensors"), dict(model.named_parameters(remove_duplicate=False))
    seen = set()
    for name, parameter in parameters.items():
        names.check(name)
        assert torch.equal(names.read(name), parameter), name
        written = names.write(name, parameter * 2)
        assert written.keys() == set(names.keys(name)), name
        for key, tensor in written.items():
            assert torch.equal(tensor, files[key] * 2), key
        seen.update(written)
    assert seen == {key for key in files if "rotary" not in key and "position_ids" not in key}


def test_mixtrals_experts_are_many_tensors_in_the_files(tmp_path):
    names = stored(mixtral(), tmp_path)
    keys = names.keys("model.layers.1.mlp.experts.gate_up_proj")
    expected = [f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w3")]
    assert sorted(keys) == sorted(expected)
    assert names.keys("model.layers.0.mlp.gate.weight") == ("model.layers.0.block_sparse_moe.gate.weight",)


def test_llavas_modules_have_other_first_parts_in_the_files(tmp_path):
    names = stored(llava(), tmp_path)
    path = "model.language_model.layers.0.self_attn.q_proj"
    (key,) = names.keys(f"{path}.weight")
    assert key != f"{path}.weight"
    assert f"{names.path_in_files(path)}.weight" == key


@pytest.mark.parametrize("change", ["taken away", "added"])
def test_files_without_the_models_first_part_or_with_another(tmp_path, change):
    """As GPT-2's own files leave out "transformer.", and those of a head's model have it for a model without one."""
    model = gpt2()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "taken away":
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    else:
        (tmp_path / "config.json").write_text(
            json.dumps({**json.loads((tmp_path / "config.json").read_text()), "architectures": ["GPT2Model"]})
        )
        model = model.transformer
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    names = Names(checkpoint, skeleton(checkpoint.config))
    for name, parameter in model.named_parameters():
        assert torch.equal(names.read(name), parameter), name


def test_parts_of_a_quantised_weight_are_found_by_their_module(tmp_path):
    tensors = {}
    for key, tensor in load_file(shutil.copy(saved_gpt2(tmp_path), tmp_path / "copy")).items():
        stem = key.removeprefix("transformer.").removesuffix(".weight")
        if key.endswith("c_fc.weight"):
            tensors |= {f"{stem}.weight": tensor.to(torch.uint8), f"{stem}.weight.absmax": torch.ones(2)}
        elif key.endswith("c_attn.weight"):
            tensors |= {f"{stem}.qweight": tensor.to(torch.int32), f"{stem}.scales": torch.ones(2)}
        else:
            tensors[key.removeprefix("transformer.")] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    names = Names(checkpoint, skeleton(checkpoint.config))
    for path in ("h.0.mlp.c_fc", "h.0.attn.c_attn", "h.0.mlp.c_proj"):
        assert names.path_in_files(f"transformer.{path}") == path
    with pytest.raises(UnreadableError, match="0 modules"):
        names.path_in_files("transformer.h.7.mlp.c_fc")


def saved_gpt2(folder):
    gpt2().save_pretrained(folder)
    return folder / "model.safetensors"


def test_a_tied_parameter_is_held_by_another_and_gets_a_key_that_transformers_takes(tmp_path):
    model = qwen(tied=True)
    names = stored(model, tmp_path)
    assert names.shared("lm_head.weight") == ["model.embed_tokens.weight"]
    assert names.keys("lm_head.weight") == names.keys("model.embed_tokens.weight")
    assert names.has("model.embed_tokens.weight")
    assert not names.has("lm_head.weight")
    assert names.new_key("lm_head.weight") == "lm_head.weight"
    untied = stored(qwen(), tmp_path / "untied")
    assert untied.has("lm_head.weight")
    assert untied.shared("lm_head.weight") == []


def test_the_new_key_of_a_llava_is_the_one_that_transformers_saves(tmp_path):
    (expected,) = stored(llava(), tmp_path / "untied").keys("lm_head.weight")
    assert stored(llava(tied=True), tmp_path / "tied").new_key("lm_head.weight") == expected


def test_what_is_missing_twice_or_of_another_shape_is_named(tmp_path):
    path = saved_gpt2(tmp_path)
    # older safetensors maps what it reads, and the file is written over
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    wanted = "transformer.h.0.mlp.c_fc.weight"
    broken = {
        "have no": {key: tensor for key, tensor in tensors.items() if key != wanted},
        "2 times": {**tensors, wanted.removeprefix("transformer."): tensors[wanted].clone()},
        "not whole": {**tensors, wanted: tensors[wanted].T.contiguous()},
    }
    for said, changed in broken.items():
        save_file(changed, path)
        checkpoint = Checkpoint(tmp_path)
        names = Names(checkpoint, skeleton(checkpoint.config))
        names.check("transformer.h.0.mlp.c_proj.weight")
        with pytest.raises(UnreadableError, match=said) as caught:
            names.check(wanted)
        assert wanted in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_mixture_without_one_expert_is_refused_before_it_is_read(tmp_path):
    mixtral().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensor = None
    names = Names(checkpoint, skeleton(checkpoint.config))
    names.check("model.layers.1.mlp.experts.gate_up_proj")
    with pytest.raises(UnreadableError, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        names.check("model.layers.0.mlp.experts.gate_up_proj")
