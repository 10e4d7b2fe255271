"""Which library multiplies, and when the weight is composed first."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from linear_fixtures import FLOOR, FP32, FP64, Problem, S, check, distance

from dora_peft.ops import linear as subject

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("n", [15, 16, 200])  # around the number from which the weight is composed: 1.5 * 33 * 29 / 62
@pytest.mark.implementation("torch")
def test_composed_weights(n, dtype, transposed):
    for given, bias in product([False, True], repeat=2):
        problem = Problem(n, width=33, out=29, dtype=dtype, bias=bias, transposed=transposed, seed=1)
        x, A, B, c, b = problem.parts()
        assert subject.composes(x, problem.weight) == (n >= 24)
        direction = subject.compose_weight(problem.weight, A.detach(), B.detach(), S) if given else None
        before = problem.weight.clone()
        y = subject.linear(x, A, B, c, S, weight=problem.weight, bias=b, direction=direction if n >= 24 else None)
        check(problem, y=y)
        assert torch.equal(problem.weight, before)
        if given:  # what the caller computed is what would have been computed
            assert torch.equal(y, subject.linear(x, A, B, c, S, weight=problem.weight, bias=b))


@pytest.mark.implementation("torch")
def test_what_is_composed():
    x = torch.randn(4096, 64)
    assert subject.composes(x, torch.randn(48, 64))
    assert not subject.composes(x.bfloat16(), torch.randn(48, 64).bfloat16())  # would round B A away
    assert not subject.composes(x.bfloat16(), torch.randn(48, 64))
    assert not subject.composes(x[:32], torch.randn(48, 64))
    assert not subject.composes(x, torch.empty(subject.COMPOSED_BYTES // 256 + 1, 64))
    with torch.autocast("cpu"):
        assert not subject.composes(x, torch.randn(48, 64))


@pytest.mark.parametrize("shape", [(0, 64, 64), (1, 2048, 1025), (64, 256, 129), (700, 65, 63), (300, 128, 96)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products_by_either_library(shape, layout, monkeypatch):
    n, width, out = shape
    x, weight, bias = torch.randn(n, width), torch.randn(out, width) / width**0.5, torch.randn(out)
    if layout == "columns":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    expected = x.double() @ weight.double().T
    for library in {subject._ONEDNN, None}:
        monkeypatch.setattr(subject, "_ONEDNN", library)
        assert distance(subject.multiply(x, weight), expected) <= FLOOR[FP32]
        assert distance(subject.multiply(x, weight, bias), expected + bias) <= FLOOR[FP32]


def test_few_tokens_give_the_bits_of_the_base_layer():
    """As PEFT's tests expect of an adapter that changes nothing yet."""
    x, weight = torch.randn(10, 1000), torch.randn(1000, 1000)
    ones, zeros = torch.ones(1000), torch.zeros(1000, 3)
    y = subject.linear(x, torch.randn(3, 1000), zeros, ones, S, weight=weight)
    assert torch.equal(y, F.linear(x, weight))


@pytest.mark.parametrize(("name", "found"), [("AMD EPYC 9B14", True), ("Intel(R) Xeon(R) Platinum 8481C", False)])
def test_another_library_than_torchs_choice_is_for_amd(name, found, monkeypatch):
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert (subject._find_onednn() is not None) == found
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert subject._find_onednn() is None
