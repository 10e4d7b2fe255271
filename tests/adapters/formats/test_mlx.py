"""mlx-lm: matrices stored the other way round, one rank and scale, names of blocks."""

import pytest
import torch
from format_fixtures import adapter

from dora_peft.adapters.formats import FORMATS, Source, UnreadableError

FORMAT = FORMATS["mlx"]
V = "model.layers.0.self_attn.v_proj"


def source_of(**config):
    files = FORMAT.write(adapter(5, 3, 2.0), None)
    return Source("adapter", dict(files.tensors), {}, {**files.json["adapter_config.json"], **config})


def test_what_is_written():
    made = adapter(5, 3, 2.0)
    made.modules["lm_head"] = made.modules[V]
    files = FORMAT.write(made, None)
    assert torch.equal(files.tensors[f"{V}.lora_a"], made.modules[V].lora_A.T)
    assert torch.equal(files.tensors[f"{V}.lora_b"], made.modules[V].lora_B.T)
    assert torch.equal(files.tensors[f"{V}.m"], made.modules[V].magnitude)
    config = files.json["adapter_config.json"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("dora", -1)
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (3, 2 / 3)
    # within a block, and by the whole path outside
    assert {"self_attn.v_proj", "mlp.down_proj", "lm_head"} <= set(parameters["keys"])
    assert not any("layers" in key for key in parameters["keys"])


def test_the_scale_is_that_of_the_config():
    found = FORMAT.read(source_of(lora_parameters={"scale": 4.0}, model="a/base"), None)
    assert {one.scaling for one in found.modules.values()} == {4.0}
    assert found.base == "a/base"


@pytest.mark.parametrize("config", [{"lora_parameters": None}, {"lora_parameters": {}}, {"lora_parameters": [1]}])
def test_no_scale(config):
    with pytest.raises(UnreadableError, match=r"whose scale in .* should be a finite number"):
        FORMAT.read(source_of(**config), None)


def test_embeddings_are_refused():
    source = source_of()
    for part in ("lora_a", "lora_b", "m"):
        source.tensors[f"model.embed_tokens.{part}"] = source.tensors[f"{V}.{part}"]
    with pytest.raises(
        UnreadableError, match=r"'model\.embed_tokens' is an embedding, whose norm mlx-lm takes per token"
    ):
        FORMAT.read(source, None)


def test_magnitudes_in_some_modules():
    made = adapter(5, 3, 2.0)
    one = made.modules[V]
    made.modules[V] = type(one)(one.lora_A, one.lora_B, one.alpha)
    with pytest.raises(UnreadableError, match="magnitudes in all modules or in none"):
        FORMAT.write(made, None)
