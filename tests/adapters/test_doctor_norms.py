"""Distances of magnitudes from a base's norms, and the order of rows in which they fit."""

from dataclasses import replace

import pytest
import torch
from format_fixtures import base_for, module

from dora_peft import reference
from dora_peft.adapters import doctor_norms
from dora_peft.adapters.doctor_norms import COLUMNS, FROM_TORCHTUNE, TO_TORCHTUNE, norms_of, of_norms
from dora_peft.adapters.formats import Adapter, Base
from dora_peft.adapters.formats.torchtune import interleaved

Q = "model.layers.0.self_attn.q_proj"
SIZE = 512


def measured(change, seed=0):
    """What is measured of a square q_proj whose magnitudes are change(W0 + s B A)."""
    one = module(SIZE, SIZE, 4, 2.0, seed=seed)
    one = replace(one, lora_B=0.01 * one.lora_B)
    base = Base(base_for(Adapter({Q: one}), seed))
    weight = base.weight(Q, one).dense()
    composed = weight + one.scaling * one.lora_B @ one.lora_A
    return norms_of(Q, one, change(composed).float(), base), weight, one


def rows(composed):
    return torch.linalg.vector_norm(composed, dim=1)


def shaken(composed):
    return rows(composed) * (1 + 0.01 * torch.randn(len(composed), generator=torch.Generator().manual_seed(1)))


def test_distances_are_those_of_the_reference():
    found, weight, one = measured(shaken)
    norm = reference.weight_norm(weight.double(), one.lora_A.double(), one.lora_B.double(), one.scaling)
    torch.testing.assert_close(found.composed, norm)
    torch.testing.assert_close(found.before, rows(weight.double()))
    assert found.distance == pytest.approx((found.magnitude / norm - 1).abs().mean().item())
    assert 0.005 < found.distance < 0.011


@pytest.mark.parametrize(
    ("change", "order"),
    [
        (rows, None),
        (shaken, None),
        (lambda composed: torch.linalg.vector_norm(composed, dim=0), COLUMNS),
        (lambda composed: interleaved(rows(composed), 2, to_torchtune=True), FROM_TORCHTUNE),
        (lambda composed: interleaved(rows(composed), 2, to_torchtune=False), TO_TORCHTUNE),
    ],
    ids=["right", "trained", "columns", "torchtune's", "twice"],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_magnitudes_fit(change, order, seed):
    """On rows of nearly equal norms, as those of a random layer are, where all distances are small."""
    found, *_ = measured(change, seed)
    assert found.distance < doctor_norms.ANOTHER_BASE
    assert found.fitting == order


def test_rows_of_zeros_count_for_nothing():
    one = module(6, 5, 2, 2.0)
    one.lora_B[2] = 0
    model = base_for(Adapter({"a": one}))
    with torch.no_grad():
        model.a.weight[2] = 0
    base = Base(model)
    found = norms_of("a", one, base.row_norms("a", one), base)
    assert found.distance == 0
    assert [finding.name for finding in of_norms([found])] == ["zero-rows"]


def test_movement_is_told_by_module():
    found, weight, one = measured(shaken)
    still = replace(found, module=replace(one, magnitude=rows(weight)), magnitude=rows(weight).double())
    moved = replace(found, path="other")
    named = {finding.name: finding.modules for finding in of_norms([still, moved])}
    assert named == {"magnitudes-never-moved": (Q,)}
    assert list(of_norms([moved])) == []
