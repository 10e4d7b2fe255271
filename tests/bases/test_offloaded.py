"""Each method of an offloaded weight brings it in, gives what the weight itself gives, and lets it go."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from dora_peft.bases import base_weight
from dora_peft.bases.offload import is_away
from dora_peft.bases.offloaded import Offloaded

A, G = torch.randn(2, 5), torch.randn(4, 3)


@pytest.fixture
def weights():
    """The same weight at hand and offloaded, and the offloaded one's layer."""
    layer = nn.Linear(5, 4)
    here = base_weight(nn.Linear(5, 4), "here", nn.Parameter(layer.weight.detach().clone()))
    cpu_offload(layer)
    assert is_away(layer)
    away = base_weight(layer, "away")
    assert type(away) is Offloaded
    yield here, away, layer
    assert layer.weight.is_meta


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.block(1, 3),
        lambda w: w.rows(torch.tensor([3, 0])),
        lambda w: w.dense(),
        lambda w: w.row_norms_squared(),
        lambda w: w.times(A),
        lambda w: w.vjp(G),
        lambda w: torch.cat([rows.clone() for _, _, rows in w.blocks()]),
    ],
    ids=["block", "rows", "dense", "row_norms_squared", "times", "vjp", "blocks"],
)
def test_reading(weights, read):
    here, away, _ = weights
    assert torch.equal(read(away), read(here))


def test_sizes_are_known(weights):
    here, away, _ = weights
    assert (away.out_features, away.in_features, away.dtype) == (here.out_features, here.in_features, here.dtype)
    assert (away.has_rows, away.mergeable, away.dense_rows) == (here.has_rows, here.mergeable, here.dense_rows)
    assert away.device.type == "cpu"


def test_a_replacement_is_made_of_what_was_brought_in(weights):
    here, away, _ = weights
    made = away.replacement(lambda rows, start, stop: 2 * rows)
    assert torch.equal(made, 2 * here.dense())
