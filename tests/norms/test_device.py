"""What the host decides for a device, with kernels that record what they are asked."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dora_peft.norms import device, grouped
from dora_peft.norms.records import Norm


@pytest.fixture
def asked(monkeypatch):
    """What the kernels are asked, as (due, another)."""
    calls = []

    def checked_norm(memory, stored, A, B, scaling, *, due, another):
        calls.append((due, another))
        return torch.ones(4)

    memory = lambda rows, where: SimpleNamespace(remembered=torch.zeros(rows, device=where))  # noqa: E731
    kernels = SimpleNamespace(Memory=memory, checked_norm=checked_norm)
    monkeypatch.setattr(device.choice, "norm_kernels", lambda: kernels)
    monkeypatch.setattr(device.choice, "uses_kernels", lambda *_: True)
    monkeypatch.setattr(grouped, "take", lambda *_: None)
    return calls


def seam(weight, readable=True):
    stored = weight if readable else None
    return SimpleNamespace(
        device=weight.device, dtype=weight.dtype, out_features=len(weight), stored=lambda: stored
    )  # fmt: skip


LAYER = SimpleNamespace(as_matrices=lambda A, B: (A, B))
A, B = torch.randn(2, 5), torch.randn(4, 2)


def check(norm, weight, scaling=1.0, readable=True):
    return device.check(LAYER, norm, A, B, scaling, weight, lambda: seam(weight, readable))


def test_what_is_due(asked):
    norm, weight = Norm(settled=True), nn.Parameter(torch.randn(4, 5), requires_grad=False)
    check(norm, weight)
    check(norm, weight)
    check(norm, weight, scaling=2.0)
    weight.add_(1)
    check(norm, weight, scaling=2.0)
    other = nn.Parameter(weight.detach().clone(), requires_grad=False)
    check(norm, other, scaling=2.0)
    check(norm, other, scaling=2.0)
    # first, unchanged, another s, another version, another tensor (whose content the device sums), unchanged
    assert asked == [(True, True), (False, False), (True, False), (True, False), (False, True), (False, False)]


def test_a_weight_that_no_kernel_reads(asked):
    norm, weight = Norm(settled=True), torch.randn(4, 5)
    assert check(norm, weight, readable=False) is None
    assert norm.device is None
    assert asked == []


def test_tied_rows_follow_past_the_version_counter():
    magnitude, value = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 1e-30, 7.0])
    before = magnitude._version
    device.follow(magnitude, torch.tensor([True, True, False]), value)
    # the least v stands for 0
    assert magnitude.tolist() == [5.0, 0.0, 3.0]
    assert magnitude._version == before
