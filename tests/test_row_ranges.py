"""Sets of rows as [[start, stop], ...], and what a config's record says about a module."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_peft._row_ranges import bare, checked_record, recorded, to_mask, to_ranges

WRONG = [None, [1, 2], [[1]], [[1, 2, 3]], [[True, 2]], [[0.0, 1]], {"0": 1}, [["0", "1"]]]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_mask_comes_back(rows):
    mask = torch.tensor(rows)
    ranges = to_ranges(mask)
    assert json.loads(json.dumps(ranges)) == ranges
    # in order, not empty, and none beside another
    edges = [edge for pair in ranges for edge in pair]
    assert edges == sorted(set(edges))
    again = to_mask(ranges, len(rows))
    assert (again is None) == (not any(rows))
    assert again is None or (again.dtype is torch.bool and torch.equal(again, mask))


def test_ranges_are_half_open():
    assert to_ranges(torch.tensor([True, True, False, True])) == [[0, 2], [3, 4]]
    assert to_ranges(torch.zeros(3, dtype=torch.bool)) == []
    assert to_mask([[1, 3]], 4).tolist() == [False, True, True, False]


@pytest.mark.parametrize("ranges", [[[-1, 2]], [[2, 2]], [[3, 1]], [[0, 5]], [[0, 1], [4, 5]]])
def test_a_range_outside_of_the_layer_is_named(ranges):
    start, stop = ranges[-1]
    with pytest.raises(ValueError, match=f"rows {start}:{stop} of a layer with 4 rows"):
        to_mask(ranges, 4)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.up",
        "base_model.model.layers.0.up",
        "base_model.model._fsdp_wrapped_module.layers._fsdp_wrapped_module.0.up",
        "_orig_mod.layers.0._orig_mod.up",
        "_fsdp_wrapped_module.base_model.model.layers.0.up",
    ],
)
def test_a_module_has_one_bare_name(name):
    assert bare(name) == "layers.0.up"


def test_only_peft_models_own_prefix_is_taken_off():
    assert bare("decoder.base_model.model.up") == "decoder.base_model.model.up"


@pytest.mark.parametrize("record", [{}, {"up": []}, {"up": [[0, 1], (2, 5)], "down": [[7, 9]]}])
def test_a_record_is_returned_as_it_is(record):
    assert checked_record(record, "tied_rows") is record


@pytest.mark.parametrize("record", [None, 5, [], "up", *({"up": rows} for rows in WRONG)])
def test_another_form_is_named_with_the_entry(record):
    with pytest.raises(ValueError, match=r"'filled_rows'.*\{module name: \[\[start, stop\].*found.*remove the entry"):
        checked_record(record, "filled_rows")


def test_what_a_record_says_about_a_module():
    record, modules = {"up": [[1, 2]], "down": []}, {"up", "down", "gate"}
    assert recorded(record, "up", 3, modules).tolist() == [False, True, False]
    # known: none of its rows
    assert recorded(record, "down", 3, modules) is None
    assert recorded(record, "gate", 3, modules) is None
    # no record, or one for modules of other names: nothing is known
    assert recorded(None, "up", 3, modules) is False
    assert recorded(record, "gate", 3, {"gate", "renamed.up"}) is False
    # a module that it does name is known all the same
    assert recorded(record, "up", 3, {"up"}).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="rows 1:2 of a layer with 1 rows"):
        recorded(record, "up", 1, modules)
