"""Tensors that do not fit together are refused by module, whatever format they come in."""

import json
import math

import pytest
import torch
from format_fixtures import adapter, base_for

from dora_peft.adapters.formats import FORMATS, Base, Source, UnreadableError, format_of
from dora_peft.adapters.formats.parts import number

V = "model.layers.0.self_attn.v_proj"
# What the tensors of this module are called by each format that is told by its keys.
KEYS = {
    "peft": [f"base_model.model.{V}.{p}" for p in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")],
    "nvlabs": [f"base_model.model.{V}.{p}" for p in ("lora_A.weight", "lora_B.weight", "weight_m_wdecomp.weight")],
    "lycoris": [f"lycoris_{V.replace('.', '_')}.{p}" for p in ("lora_down.weight", "lora_up.weight", "dora_scale")],
    "ai-toolkit": [f"{V}.{p}" for p in ("lora_A.weight", "lora_B.weight", "magnitude")],
    "mlx": [f"{V}.{p}" for p in ("lora_a", "lora_b", "m")],
    "torchtune": [f"layers.0.attn.v_proj.{p}" for p in ("lora_a.weight", "lora_b.weight", "magnitude")],
}
formats = pytest.mark.parametrize("name", KEYS)


def source_of(name, **changes):
    """An adapter's source in a format, with some tensors of v_proj changed."""
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    files = FORMATS[name].write(made, base)
    tensors = dict(files.tensors)
    for part, change in changes.items():
        key = KEYS[name]["ABm".index(part)]
        tensors[key] = change(tensors[key])
    return Source("adapter", tensors, files.metadata, files.json.get("adapter_config.json")), base


def refused(name, match, **changes):
    source, base = source_of(name, **changes)
    with pytest.raises(UnreadableError, match=match) as caught:
        FORMATS[name].read(source, base)
    assert V in str(caught.value)
    assert "\n" not in str(caught.value)


@formats
def test_nothing_is_refused_of_what_was_written(name):
    source, base = source_of(name)
    assert format_of(source) == name
    assert len(FORMATS[name].read(source, base).modules) == 5


@formats
@pytest.mark.parametrize("numbers", [0, 1, 3, 49])
def test_magnitudes_of_another_number(name, numbers):
    refused(name, "magnitudes|dora_scale of shape", m=lambda m: torch.ones(numbers))


@formats
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[0],
        lambda t: t[None],
        lambda t: t[:0],
        lambda t: t[:, :0],
        lambda t: torch.cat([t, t], 1),
        lambda t: torch.tensor(1.0),
    ],
    ids=["a row", "three dimensions", "no rows", "no columns", "twice as wide", "one number"],
)
def test_factors_of_other_shapes(name, part, change):
    if part == "A" and change(torch.ones(2, 2)).shape == (2, 4) and name != "mlx":
        pytest.skip("it is for a base with more inputs")
    if part == "B" and name == "mlx" and change(torch.ones(2, 2)).shape == (2, 4):
        pytest.skip("it is for a base with more outputs; the magnitudes tell")
    refused(name, "expected|should be|magnitudes", **{part: change})


@formats
@pytest.mark.parametrize("part", ["A", "B", "m"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_what_is_no_floating_point(name, part, dtype):
    refused(name, "expected floating point numbers", **{part: lambda t: t.to(dtype)})


@formats
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_factor_is_missing(name, part):
    source, base = source_of(name)
    del source.tensors[KEYS[name]["AB".index(part)]]
    lacks = {"A": "lora_A", "B": "lora_B"}[part]
    with pytest.raises(UnreadableError, match=rf"{V}.* no {lacks}"):
        FORMATS[name].read(source, base)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("peft", f"base_model.model.{V}.lora_magnitude_vector"),
        ("peft", f"{V}.lora_A.weight"),
        ("nvlabs", f"base_model.model.{V}.lora_magnitude_vector.weight"),
        ("ai-toolkit", f"diffusion_model.{V}.magnitude"),
    ],
)
def test_two_tensors_for_one_part(name, extra):
    source, base = source_of(name)
    source.tensors[extra] = torch.ones(7)
    with pytest.raises(UnreadableError, match=f"'{V}' has two tensors for the same part, .*'{extra}'"):
        FORMATS[name].read(source, base)


def test_two_names_for_one_module():
    source, base = source_of("lycoris")
    source.tensors.update({key.replace("lycoris_", "lora_"): t for key, t in list(source.tensors.items())})
    with pytest.raises(UnreadableError, match="are the same module"):
        FORMATS["lycoris"].read(source, base)
    source, base = source_of("lycoris")
    names = json.loads(source.metadata["dora_peft_paths"])
    source.metadata["dora_peft_paths"] = json.dumps(dict.fromkeys(names, V))
    with pytest.raises(UnreadableError, match="are the same module"):
        FORMATS["lycoris"].read(source, base)


@pytest.mark.parametrize("path", ["../../x", "a\x1b[31m", 5, None, "a/b"])
def test_paths_in_metadata_that_are_none(path):
    source, base = source_of("lycoris")
    source.metadata["dora_peft_paths"] = json.dumps({KEYS["lycoris"][0].partition(".")[0]: path})
    with pytest.raises(UnreadableError, match="which is no module's path") as caught:
        FORMATS["lycoris"].read(source, base)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[1]", "{", "5", "[" * 100_000], ids=range(4))
def test_damaged_metadata(text):
    source, base = source_of("lycoris")
    source.metadata["dora_peft_paths"] = text
    with pytest.raises(UnreadableError, match="is damaged"):
        FORMATS["lycoris"].read(source, base)


@pytest.mark.parametrize("alpha", [[1, 1], [], 1j, math.nan, math.inf])
def test_alphas_that_are_no_number(alpha):
    alpha = torch.tensor(alpha)
    source, base = source_of("lycoris")
    source.tensors[KEYS["lycoris"][0].replace("lora_down.weight", "alpha")] = alpha
    with pytest.raises(UnreadableError, match=f"'{V}': alpha should be"):
        FORMATS["lycoris"].read(source, base)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, None, "4", [4]])
def test_numbers(value):
    with pytest.raises(UnreadableError, match="it should be a finite number, found"):
        number(value, "it")
    for name, change in {"peft": {"lora_alpha": value}, "mlx": {"lora_parameters": {"scale": value}}}.items():
        source, base = source_of(name)
        source.config.update(change)
        with pytest.raises(UnreadableError, match="should be a finite number"):
            FORMATS[name].read(source, base)


@pytest.mark.parametrize("rank", [4.5, 4.0, 1e400, math.nan, True, "3", 0, -3])
def test_ranks_that_are_none(rank):
    source, base = source_of("peft")
    source.config["r"] = rank
    with pytest.raises(UnreadableError, match=r"r of .* should be a positive integer"):
        FORMATS["peft"].read(source, base)


@pytest.mark.parametrize("patterns", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_no_regular_expressions(patterns):
    source, base = source_of("peft")
    source.config[patterns] = {"(": 4}
    with pytest.raises(UnreadableError, match=rf"{patterns} holds no regular expression"):
        FORMATS["peft"].read(source, base)


@pytest.mark.parametrize("kind", ["VERA", "ADALORA", 5, None])
def test_other_kinds_of_adapters(kind):
    source, base = source_of("peft")
    source.config["peft_type"] = kind
    with pytest.raises(UnreadableError, match=f"peft_type '{kind}', and only LORA and DORA"):
        FORMATS["peft"].read(source, base)


def test_other_tensors_of_mlx():
    source, base = source_of("mlx")
    source.tensors["model.norm.weight"] = torch.ones(5)
    with pytest.raises(UnreadableError, match=r"'model\.norm\.weight' is no part of an adapter"):
        FORMATS["mlx"].read(source, base)


@pytest.mark.parametrize("path", ["transformer.h.0.attn.c_attn", "layers.0.q_proj"])
def test_names_that_mlx_may_have_otherwise(path):
    made = adapter(5, 3, 2.0)
    made.modules[path] = made.modules.pop(V)
    with pytest.raises(UnreadableError, match=f"mlx-lm may name module '{path}' otherwise"):
        FORMATS["mlx"].write(made, None)


@pytest.mark.parametrize("name", ["trtllm", "comfyui-2026"])
def test_rows_of_zeros_that_a_format_divides_by(name):
    made = adapter(5, 3, 2.0)
    model = base_for(made)
    with torch.no_grad():
        model.get_submodule(V).weight[2] = 0
        if name == "trtllm":
            made.modules[V].lora_B[2] = 0
    with pytest.raises(UnreadableError, match=f"{name} divides by.*'{V}' has 1 rows of zeros"):
        FORMATS[name].write(made, Base(model))
