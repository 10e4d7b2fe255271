"""The one form that all formats are read into."""

from dataclasses import replace

import pytest
import torch
from format_fixtures import adapter, module

from dora_peft.adapters.formats import Adapter, Module, UnreadableError
from dora_peft.adapters.formats.adapter import check_holds, check_layers, number_in, one_rank


def test_sizes_and_scaling():
    one = module(7, 5, 3, 2.0)
    assert (one.rank, one.out_features, one.in_features, one.scaling) == (3, 7, 5, 2 / 3)
    kernel = module(7, 5, 3, 2.0, kernel=(3, 2))
    assert (kernel.out_features, kernel.in_features) == (7, 30)
    assert [m.shape for m in kernel.matrices()] == [(3, 30), (7, 3)]


def test_magnitudes_are_changed_where_there_are_some():
    made = adapter(5, 3, 2.0)
    path = next(iter(made.modules))
    made.modules[path] = replace(made.modules[path], magnitude=None)
    found = made.with_magnitudes(lambda name, one: 2 * one.magnitude)
    assert found.modules[path].magnitude is None
    others = [name for name in made.modules if name != path]
    assert all(torch.equal(found.modules[n].magnitude, 2 * made.modules[n].magnitude) for n in others)


def holding(**changes):
    """An adapter of one module."""
    return Adapter({"a": replace(module(6, 4, 2, 2.0), **changes)})


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (holding(embedding=True), "x has no embeddings, and module 'a' is one"),
        (Adapter({"a": module(6, 4, 2, 2.0, kernel=(3,))}), "x has linear layers alone, and module 'a' is none"),
    ],
)
def test_layers_that_a_format_does_not_have(made, said):
    with pytest.raises(UnreadableError, match=said):
        check_layers(made, "x")


def test_grouped_convolutions():
    one = Module(torch.ones(4, 6, 3), torch.ones(8, 2, 1), 2.0, torch.ones(8))
    with pytest.raises(UnreadableError, match="no grouped convolutions, and module 'a' is one"):
        check_layers(Adapter({"a": one}), "x", convolutions=True)
    check_layers(Adapter({"a": module(6, 4, 2, 2.0, kernel=(3,))}), "x", convolutions=True)


def test_other_tensors():
    made = holding()
    check_holds(made, "x")
    made.others["lm_head.weight"] = torch.ones(2)
    with pytest.raises(UnreadableError, match=r"x holds factors and magnitudes alone.*'lm_head\.weight'"):
        check_holds(made, "x")


def test_one_rank_for_all():
    made = adapter(5, 3, 2.0)
    assert one_rank(made, "x") == (3, 2.0)
    path = next(iter(made.modules))
    made.modules[path] = replace(made.modules[path], alpha=2.5)
    with pytest.raises(UnreadableError, match=r"has 2: \(rank, alpha\) \(3, 2\.0\), \(3, 2\.5\)"):
        one_rank(made, "x")


@pytest.mark.parametrize(
    ("dtype", "value", "kept"),
    [
        (torch.bfloat16, 32.0, torch.bfloat16),
        (torch.bfloat16, 257.0, torch.float32),
        (torch.float16, 0.1, torch.float64),
        (torch.float32, 2**0.5, torch.float64),
    ],
)
def test_numbers_keep_their_value(dtype, value, kept):
    found = number_in(dtype, value)
    assert found.dtype is kept
    assert found.item() == value
