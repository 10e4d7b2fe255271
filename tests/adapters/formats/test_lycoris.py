"""LyCORIS, OneTrainer and ComfyUI: names, axes of dora_scale, and what they hold of other methods."""

import json

import pytest
import torch
from format_fixtures import adapter, base_for, module

from dora_peft.adapters.formats import FORMATS, Adapter, Base, Source, UnreadableError, lycoris

FORMAT = FORMATS["lycoris"]
V = "model.layers.0.self_attn.v_proj"
FLAT = V.replace(".", "_")


def source_of(made, prefix="lycoris_", metadata=True, **changes):
    files = FORMAT.write(made, None)
    tensors = {key.replace("lycoris_", prefix): tensor for key, tensor in files.tensors.items()}
    tensors.update({f"{prefix}{FLAT}.{part.replace('_weight', '.weight')}": t for part, t in changes.items()})
    return Source("adapter", tensors, dict(files.metadata) if metadata else {}, None)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "lora_transformer_", "lora_te1_", "lora_"])
def test_names_of_every_prefix_by_the_base(prefix):
    made = adapter(5, 3, 2.0)
    source = source_of(made, prefix, metadata=False)
    found = FORMAT.read(source, Base(base_for(made)))
    assert found.modules.keys() == made.modules.keys()
    with pytest.raises(UnreadableError, match="cannot be told from the name alone: name the base with --base"):
        FORMAT.read(source, None)


def test_names_that_the_base_does_not_have_or_has_twice():
    made = adapter(5, 3, 2.0)
    source = source_of(made, metadata=False)
    other = Adapter({path.replace("self_attn", "attention"): one for path, one in made.modules.items()})
    with pytest.raises(UnreadableError, match="'the base' has no such module"):
        FORMAT.read(source, Base(base_for(other)))
    twice = Adapter({**made.modules, V.replace("self_attn.v", "self_attn_v"): made.modules[V]})
    with pytest.raises(UnreadableError, match=f"it may be {V} or "):
        FORMAT.read(source, Base(base_for(twice)))


def test_paths_with_dots_are_paths():
    made = adapter(5, 3, 2.0)
    tensors = {
        key.replace(f"lycoris_{FLAT}", V): t for key, t in FORMAT.write(made, None).tensors.items() if FLAT in key
    }
    assert list(FORMAT.read(Source("adapter", tensors), None).modules) == [V]


def test_two_paths_with_one_flattened_name():
    one = module(7, 5, 3, 2.0)
    with pytest.raises(UnreadableError, match=r"'a\.b' and 'a_b' have the same name in this format, 'lycoris_a_b'"):
        FORMAT.write(Adapter({"a.b": one, "a_b": one}), None)


def test_alpha_is_the_rank_where_it_is_missing():
    made = adapter(5, 3, 2.0)
    source = source_of(made)
    del source.tensors[f"lycoris_{FLAT}.alpha"]
    found = FORMAT.read(source, None).modules
    assert found[V].scaling == 1
    assert found["model.layers.0.mlp.down_proj"].scaling == 2 / 3


@pytest.mark.parametrize(
    ("shape", "axis", "said"),
    [
        ((7, 1), None, "output"),
        ((7,), None, "output"),
        ((1, 5), None, "norm per input column"),
        ((5,), None, "norm per input column"),
        ((5, 1), None, r"dora_scale of shape \[5, 1\]: expected \[7, 1\] or \[1, 5\]"),
        ((1, 7), None, r"dora_scale of shape \[1, 7\]"),
    ],
)
def test_axes_by_shape(shape, axis, said):
    source = source_of(adapter(5, 3, 2.0), dora_scale=torch.rand(shape))
    if said == "output":
        assert FORMAT.read(source, None).modules[V].magnitude.shape == (7,)
    else:
        with pytest.raises(UnreadableError, match=said):
            FORMAT.read(source, None)


@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (7,)])
def test_axes_of_square_layers(shape):
    made = adapter(7, 3, 2.0)
    source = source_of(made, dora_scale=torch.rand(shape))
    if shape == (7, 1):
        assert FORMAT.read(source, None).modules[V].magnitude is not None
        return
    said = "norm per input column" if shape == (1, 7) else "is square and its dora_scale"
    with pytest.raises(UnreadableError, match=said):
        FORMAT.read(source, None)
    if shape == (7,):
        assert lycoris.read(source, None, "output").modules[V].magnitude is not None
        with pytest.raises(UnreadableError, match="norm per input column"):
            lycoris.read(source, None, "input")


def test_norms_per_input_column_are_described():
    source = source_of(adapter(5, 3, 2.0), dora_scale=torch.rand(1, 5))
    found = lycoris.read(source, None, describe=True)
    assert found.modules[V].magnitude is None
    assert found.notes == [f"{V} has a norm per input column, which is no DoRA per output row"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("lora_mid.weight", "Tucker"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("diff", "full difference"),
        ("x", "Expected"),
    ],
)
def test_parts_of_other_methods(part, said):
    source = source_of(adapter(5, 3, 2.0))
    source.tensors[f"lycoris_{FLAT}.{part}"] = torch.ones(2)
    with pytest.raises(UnreadableError, match=f"cannot convert 'lycoris_{FLAT}.{part}'.*{said}"):
        FORMAT.read(source, None)


def test_paths_travel_in_the_head():
    made = adapter(5, 3, 2.0)
    files = FORMATS["onetrainer"].write(made, None)
    assert all(key.startswith("lora_unet_") for key in files.tensors)
    assert set(json.loads(files.metadata[lycoris.PATHS]).values()) == set(made.modules)


def test_comfyui_divides_by_the_base_alone():
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    tensors = FORMATS["comfyui-2026"].write(made, base).tensors
    before, composed = base.norms(V, made.modules[V])
    expected = made.modules[V].magnitude.double() * before / composed
    torch.testing.assert_close(tensors[f"lora_unet_{FLAT}.dora_scale"].flatten().double(), expected)
