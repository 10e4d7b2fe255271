"""PEFT's keys, NVlabs' and TensorRT-LLM's: spellings, what the config says of s, diffusers' heads."""

import json

import pytest
import torch
from format_fixtures import adapter, base_for, module
from peft import LoraConfig

from dora_peft.adapters.formats import FORMATS, Adapter, Base, Source, UnreadableError, peft_keys

FORMAT = FORMATS["peft"]
V = "model.layers.0.self_attn.v_proj"


def source_of(name="peft", metadata=None, **config):
    files = FORMATS[name].write(adapter(5, 4, 2.0), None)
    entries = {**files.json["adapter_config.json"], **config}
    return Source("adapter", dict(files.tensors), metadata or {}, None if metadata else entries)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("ending", [".weight", ""])
def test_every_spelling_is_read(prefix, ending):
    source = source_of()
    expected = FORMAT.read(source, None).modules
    tensors = {}
    for key, tensor in source.tensors.items():
        key = key.removeprefix("base_model.model.")
        tensors[prefix + (key.removesuffix(".weight") + ending if "magnitude" in key else key)] = tensor
    found = FORMAT.read(Source("adapter", tensors, {}, source.config), None).modules
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path].magnitude, expected[path].magnitude) for path in expected)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"alpha_pattern": {"v_proj": 10}}, 2.5),
        ({"alpha_pattern": {"k_proj": 10}}, 0.5),
        ({"r": 8, "rank_pattern": {".*": 4}, "lora_alpha": 1}, 0.25),
    ],
)
def test_s_is_what_peft_takes_from_the_config(config, scaling):
    assert FORMAT.read(source_of(**config), None).modules[V].scaling == scaling


def test_patterns_that_are_written_are_those_of_the_modules():
    made = adapter(5, 4, 2.0)
    made.modules[V] = module(7, 5, 2, 9.0)
    made.modules["x"] = module(7, 5, 4, 3.0)
    files = FORMAT.write(made, None)
    config = files.json["adapter_config.json"]
    assert LoraConfig(**config).use_dora
    found = FORMAT.read(Source("adapter", files.tensors, {}, config), None).modules
    assert {path: (m.rank, m.alpha) for path, m in found.items()} == {
        path: (m.rank, m.alpha) for path, m in made.modules.items()
    }


def test_a_config_that_was_read_is_written_again():
    source = source_of(lora_dropout=0.3, task_type="CAUSAL_LM")
    config = FORMAT.write(FORMAT.read(source, None), None).json["adapter_config.json"]
    assert config == source.config


def test_magnitudes_have_the_shapes_of_their_layers():
    linear, kernel = module(7, 5, 3, 2.0), module(7, 5, 3, 2.0, kernel=(3, 2))
    tensors = FORMAT.write(Adapter({"a": linear, "b": kernel}), None).tensors
    shapes = {key.split(".")[2]: tuple(t.shape) for key, t in tensors.items() if "magnitude" in key}
    assert shapes == {"a": (7,), "b": (1, 7, 1, 1)}
    assert FORMATS["nvlabs"].write(Adapter({"a": linear}), None).tensors[
        "base_model.model.a.weight_m_wdecomp.weight"
    ].shape == (7, 1)


def test_nvlabs_entries_that_peft_does_not_know_are_left_out():
    source = source_of("nvlabs", Wdecompose_target_modules=["o_proj"])
    assert source.config["peft_type"] == "DORA"
    found = FORMATS["nvlabs"].read(source, None)
    assert "Wdecompose_target_modules" not in found.config
    LoraConfig(**FORMAT.write(found, None).json["adapter_config.json"])


def test_a_magnitude_alone():
    source = source_of("nvlabs")
    source.tensors["base_model.model.x.weight_m_wdecomp.weight"] = torch.ones(4, 1)
    with pytest.raises(UnreadableError, match="Module 'x' has no lora_A and no lora_B, a magnitude alone"):
        FORMATS["nvlabs"].read(source, None)


@pytest.mark.parametrize("part", ["", "unet."])
def test_the_config_in_the_head_of_diffusers_files(part):
    head = json.dumps({f"{part}r": 4, f"{part}lora_alpha": 8})
    source = source_of(metadata={peft_keys.DIFFUSERS: head})
    tensors = {part + key.removeprefix("base_model.model."): t for key, t in source.tensors.items()}
    found = FORMAT.read(Source("adapter", tensors, source.metadata, None), None)
    assert found.modules[V].scaling == 2
    assert found.config == {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("head", ["[1]", "{", "5", json.dumps({"unet.r": 4, "text_encoder.r": 4}), "{}"])
def test_heads_that_are_none(head):
    with pytest.raises(UnreadableError, match=r"is damaged|more than one model"):
        FORMAT.read(source_of(metadata={peft_keys.DIFFUSERS: head}), None)


def test_trtllm_holds_what_rows_are_multiplied_by():
    made = adapter(5, 4, 2.0)
    base = Base(base_for(made))
    tensors = FORMATS["trtllm"].write(made, base).tensors
    _, composed = base.norms(V, made.modules[V])
    expected = made.modules[V].magnitude.double() / composed
    torch.testing.assert_close(tensors[f"base_model.model.{V}.lora_magnitude_vector"].double(), expected)
