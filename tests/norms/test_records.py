"""The records of a norm: what goes with a new one, and what a copy keeps."""

import copy
from types import SimpleNamespace

import torch

from dora_peft.norms.records import Folded, Norm, Snapshot
from dora_peft.ops.content import Bits


def snapshot():
    return Snapshot(torch.ones(3), None, None, None, 1.0, None, False)


def test_a_new_norm_takes_what_was_folded_by_the_last_one():
    norm, known = Norm(settled=True, folded=SimpleNamespace()), snapshot()
    assert norm.renew(known) is known
    assert norm.known is known
    assert norm.folded is None


def test_a_copy_keeps_ties_and_computes_the_rest_again():
    norm = Norm(torch.tensor([True]), True, snapshot(), SimpleNamespace(), SimpleNamespace())
    copied = copy.deepcopy(norm)
    assert copied.settled
    assert torch.equal(copied.tied, norm.tied)
    assert (copied.known, copied.folded, copied.device) == (None, None, None)


def test_what_is_folded_belongs_to_one_norm_and_one_magnitude():
    known, magnitude = snapshot(), torch.tensor([1.0, 2.0, 3.0])
    folded = Folded(torch.ones(3, 2), 1.0, torch.ones(3), None, known, Bits(magnitude))
    assert folded.fits(known, magnitude.clone())
    # an equal norm is another one
    assert not folded.fits(snapshot(), magnitude)
    magnitude[1] += 1
    assert not folded.fits(known, magnitude)
