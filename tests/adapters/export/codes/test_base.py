"""One module's tensors in a checkpoint, and scales that take c."""

import pytest
import torch
from codes_fixtures import PATH, held
from hypothesis import given
from hypothesis import strategies as st

from dora_peft.adapters.export.codes.base import Stored, per_row, scaled
from dora_peft.adapters.formats import UnreadableError

STORED = Stored(held({"weight": torch.ones(2, 3), "weight.absmax": torch.ones(4), "count": torch.tensor(1)}), PATH)


def test_the_names_are_those_of_this_module_alone():
    assert STORED.names == ["weight", "weight.absmax", "count"]
    assert STORED.keys("weight", "bias", "weight.absmax") == (f"{PATH}.weight", f"{PATH}.weight.absmax")
    assert set(STORED.tensors(STORED.keys("count"))) == {f"{PATH}.count"}
    assert Stored(STORED.checkpoint, PATH.rpartition(".")[0]).names[0] == "up_projs.weight"
    assert Stored(STORED.checkpoint, "nothing").names == []
    assert STORED.matrix("weight") == (2, 3)
    with pytest.raises(UnreadableError, match=rf"{PATH}.*'weight.absmax' is of shape \[4\]"):
        STORED.matrix("weight.absmax")
    with pytest.raises(UnreadableError, match=rf"{PATH}.*'count' is torch.int64"):
        STORED.floats("count")


@given(
    c=st.lists(st.floats(-3, 3, width=64), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_a_product_is_rounded_once(c, dtype):
    scale, c = torch.tensor([0.5, -0.25, 3e-3, 7, 1e-2]).to(dtype), torch.tensor(c, dtype=torch.float64)
    exact = scale.double() * c
    found = scaled(STORED, scale, c)
    assert found.dtype == dtype
    # no number of the dtype is nearer
    for towards in (-torch.inf, torch.inf):
        neighbour = torch.nextafter(found, torch.full_like(found, towards)).double()
        error, other = (found.double() - exact).abs(), (neighbour - exact).abs()
        # through fp32 on the way to 16 bits
        assert (error <= other + exact.abs() * 2**-24 + 1e-45).all()


def test_a_scale_has_to_stay_in_its_range():
    with pytest.raises(UnreadableError, match=rf"{PATH}.*reaches 7e\+04: expected at most 6.55e\+04.*--dequantize"):
        scaled(STORED, torch.tensor([7.0]).half(), torch.tensor([1e4]))
    assert scaled(STORED, torch.tensor([7.0]).half(), torch.tensor([1e4]), torch.float32) == 7e4


@pytest.mark.parametrize("c", [torch.ones(3), torch.ones(2, 1), torch.tensor([1, float("inf")])])
def test_c_is_one_finite_number_a_row(c):
    with pytest.raises(UnreadableError, match="2 finite numbers, one a row"):
        per_row(STORED, c, 2)
    assert not per_row(STORED, torch.ones(2, requires_grad=True), 2).requires_grad
