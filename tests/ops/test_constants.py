"""Each number is where what it is about begins to be lost: neither later nor needlessly early."""

import platform

import pytest
import torch

from dora_peft import reference
from dora_peft.bases import base_weight
from dora_peft.ops import norm
from dora_peft.ops.constants import CANCELLATION, DROWNED, LOW_PRECISION, TINY, interpreted

DTYPES = [*LOW_PRECISION, torch.float32, torch.float64]
S = 0.5


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power_of_two(number):
    """The least at or above it, by which multiplication is exact."""
    return 2.0 ** torch.tensor(number, dtype=torch.float64).log2().ceil()


def error_of_z(dtype, c, offset=0.0):
    """That of z = (y - b) / c with y = c z + b rounded to `dtype`, relative."""
    z = randn(100_000).to(dtype).double()
    y = (c * z + offset).to(dtype).double()
    return (((y - offset) / c - z).norm() / z.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_tiny_y_holds_as_much_of_z_as_at_one(dtype):
    """By another number than a power of two, so that y is rounded at all."""
    usual = error_of_z(dtype, 1.1)
    assert usual > 0
    c = power_of_two(TINY[dtype])
    assert error_of_z(dtype, 1.1 * c) <= 1.001 * usual
    # and smallest numbers begin soon below it
    smallest = torch.finfo(dtype).tiny
    assert error_of_z(dtype, 1.1 * smallest) > 1.1 * usual
    assert TINY[dtype] < 0.01


@pytest.mark.parametrize(("dtype", "bits"), [(d, 2 if d in LOW_PRECISION else 10) for d in DTYPES], ids=str)
def test_a_bias_that_drowns_z_takes_as_many_bits_as_are_given_up(dtype, bits):
    """Of z = 1 with a bias so much larger, over many biases."""
    biases = 1 + torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    usual = torch.finfo(dtype).eps / 2

    def lost(ratio):
        part = ratio * biases
        y = (part + biases).to(dtype).double()
        # of fp64 the sum in fp64 is the rounding
        error = (y - biases - part) / part
        return torch.log2(error.abs().max() / usual).item()

    if dtype is torch.float64:
        # the rounding of the difference, too, is fp64's
        bits += 1
    assert lost(DROWNED[dtype]) <= bits + 0.5
    assert lost(DROWNED[dtype] / 4) > bits


def error_of_factored_sum(part, monkeypatch):
    """The worst of many rows, if none is computed densely and v^2 is `part` of ||W0||^2 + s^2 ||BA||^2 in all."""
    monkeypatch.setattr(norm, "CANCELLATION", 0.0)
    height, width, rank = 500, 400, 8
    A, B = randn(rank, width, seed=1).float() / width**0.5, randn(height, rank, seed=2).float() / rank**0.5
    change, rest = S * B.double() @ A.double(), randn(height, width, seed=3)
    # both parts are about as large as one another
    rest *= (2 * part) ** 0.5 * change.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True)
    layer = torch.nn.Linear(width, height, bias=False)
    layer.weight = torch.nn.Parameter((rest - change).float(), requires_grad=False)
    weight = base_weight(layer, "layer")
    truth = reference.weight_norm(layer.weight.double(), A.double(), B.double(), S)
    found = norm.factored_norm_squared(weight, weight.row_norms_squared(), A, B, S).sqrt()
    return ((found.double() - truth).abs() / truth).max().item()


def test_the_factored_sum_is_left_before_it_cancels(monkeypatch):
    assert error_of_factored_sum(CANCELLATION, monkeypatch) <= 1e-6
    assert error_of_factored_sum(CANCELLATION / 10, monkeypatch) > 1e-6
    # rows that have nothing to do with one another are never computed densely
    weight, change = randn(2000, 64), randn(2000, 64, seed=1)
    squares = (weight.square() + change.square()).sum(1)
    assert ((weight + change).square().sum(1) > CANCELLATION * squares).all()


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
@pytest.mark.parametrize("value", ["1", "true", "on", "On", "0", "false", "off", "", "yes", "Y", "t", "2", None])
def test_the_interpreter_is_asked_for_as_triton_asks(value, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() == knobs.runtime.interpret
