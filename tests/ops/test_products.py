"""Which library multiplies, and when the weight is composed first."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from linear_fixtures import FLOOR, FP32, FP64, Problem, S, check, distance

from dora_peft.ops import linear, products
from dora_peft.ops.options import options_for

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def composes(x, weight):
    """Whether `linear` multiplies x by c (W0 + s B A)."""
    out, width = weight.shape
    A, B, c = x.new_zeros(2, width), x.new_zeros(out, 2), torch.ones(out)
    return len(x) >= options_for(x, A, B, c, S, weight, None, None, 0.0, None).products.composed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32])
# around the number from which the weight is composed: 2.5 * 33 * 29 / 62
@pytest.mark.parametrize("n", [15, 38, 39, 200])
@pytest.mark.implementation("torch")
def test_composed_weights(n, dtype, transposed):
    for given, bias in product([False, True], repeat=2):
        problem = Problem(n, width=33, out=29, dtype=dtype, bias=bias, transposed=transposed, seed=1)
        x, A, B, c, b = problem.parts()
        assert composes(x, problem.weight) == (n >= 39)
        composed = products.compose_weight(problem.weight, A.detach(), B.detach(), S) if given else None
        before = problem.weight.clone()
        y = linear.linear(x, A, B, c, S, weight=problem.weight, bias=b, composed=composed if n >= 39 else None)
        check(problem, y=y)
        assert torch.equal(problem.weight, before)
        # what the caller computed is what would have been computed
        if given:
            assert torch.equal(y, linear.linear(x, A, B, c, S, weight=problem.weight, bias=b))


@pytest.mark.implementation("torch")
def test_what_is_composed():
    x = torch.randn(4096, 64)
    assert composes(x, torch.randn(48, 64))
    # would round B A away
    assert not composes(x.bfloat16(), torch.randn(48, 64).bfloat16())
    assert not composes(x.bfloat16(), torch.randn(48, 64))
    assert not composes(x[:32], torch.randn(48, 64))
    assert not composes(x, torch.empty(products.COMPOSED_BYTES // 256 + 1, 64))
    with torch.autocast("cpu"):
        assert not composes(x, torch.randn(48, 64))


@pytest.mark.parametrize("shape", [(0, 64, 64), (1, 2048, 1025), (64, 256, 129), (700, 65, 63), (300, 128, 96)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products_by_either_library(shape, layout, monkeypatch):
    n, width, out = shape
    x, weight, bias = torch.randn(n, width), torch.randn(out, width) / width**0.5, torch.randn(out)
    if layout == "columns":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    expected = x.double() @ weight.double().T
    for library in {products._ONEDNN, None}:
        monkeypatch.setattr(products, "_ONEDNN", library)
        assert distance(products.multiply_many(x, weight), expected) <= FLOOR[FP32]
        assert distance(products.multiply_many(x, weight, bias), expected + bias) <= FLOOR[FP32]


def test_few_tokens_give_the_bits_of_the_base_layer():
    """As PEFT's tests expect of an adapter that changes nothing yet."""
    x, weight = torch.randn(10, 1000), torch.randn(1000, 1000)
    ones, zeros = torch.ones(1000), torch.zeros(1000, 3)
    y = linear.linear(x, torch.randn(3, 1000), zeros, ones, S, weight=weight)
    assert torch.equal(y, F.linear(x, weight))


@pytest.mark.parametrize(
    ("name", "avx512", "found"),
    [("AMD EPYC 9B14", True, True), ("AMD EPYC 7B13", False, False), ("Intel(R) Xeon(R) Platinum 8481C", True, False)],
)
def test_another_library_than_torchs_choice_is_for_amd_with_avx512(name, avx512, found, monkeypatch):
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    capabilities = {"cpu_name": name, "avx512_f": avx512}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert (products._find_onednn() is not None) == found
    # an older torch
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert products._find_onednn() is None


@pytest.mark.parametrize("rank", [1, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("width", [7, 512])
def test_times_transposed(width, rank):
    thin, wide = torch.randn(9, rank, dtype=torch.float64), torch.randn(9, width, dtype=torch.float64)
    torch.testing.assert_close(products.times_transposed(thin, wide), thin.T @ wide)
