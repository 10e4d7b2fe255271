"""The measurement of one module against dense float64 formulas."""

import math

import pytest
import torch
from analysis_fixtures import truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.memory import tensors_in
from dora_peft.analysis import Change, compare_low_rank, compare_weights
from dora_peft.analysis import change as subject
from dora_peft.bases.opaque import Opaque


def factors(out=48, inner=40, r=3, dtype=torch.float32):
    return torch.randn(r, inner, dtype=dtype), torch.randn(out, r, dtype=dtype)


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_changes_of_any_size_equal_the_dense_truth(size, dtype):
    weight0 = torch.randn(48, 40).to(dtype)
    A, B = factors()
    scaling = size / 10
    weight = weight0.double() + scaling * B.double() @ A.double()
    # below 1e-6 the truth itself loses digits: W0 + D rounds D
    rel = max(1e-9, 1e-14 / size)
    expected = truth(weight0, weight)
    assert tuple(compare_low_rank(weight0, A, B, scaling)) == pytest.approx(expected, rel=rel)
    if dtype == torch.float64:
        assert tuple(compare_weights(weight0, weight)) == pytest.approx(expected, rel=rel)
    m = weight0.double().norm(dim=1) * (1 + size * torch.rand(48))
    assert tuple(compare_low_rank(weight0, A, B, scaling, m)) == pytest.approx(truth(weight0, weight, m), rel=rel)


def test_the_naive_formula_fails_where_ours_does_not():
    weight0 = torch.randn(48, 40, dtype=torch.float64)
    A, B = factors()
    weight = weight0 + 1e-9 * B.double() @ A.double()
    naive = (1 - nn.functional.cosine_similarity(weight0, weight, dim=1)).mean().item()
    expected = truth(weight0, weight)[1]
    assert abs(naive / expected - 1) > 0.5
    assert compare_low_rank(weight0, A, B, 1e-9).direction == pytest.approx(expected, rel=1e-5)


def test_opposite_and_orthogonal_rows():
    weight0 = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    weight = torch.tensor([[-3.0, 0.0], [0.0, 1.0], [-1.0, -1e-3], [2.0, 0.0]])
    change = compare_weights(weight0, weight)
    assert tuple(change) == pytest.approx(truth(weight0, weight), rel=1e-12)
    assert change.direction == pytest.approx((2 + 1 + (2 - 5e-7) + 0) / 4, rel=1e-9)
    assert compare_weights(weight0[:1], weight[:1]) == Change(2.0, 2.0)


def test_a_scaled_weight_changes_in_magnitude_alone():
    weight0 = torch.randn(8, 6, dtype=torch.float64)
    change = compare_weights(weight0, 1.5 * weight0)
    assert change.magnitude == pytest.approx(0.5 * weight0.norm(dim=1).mean().item())
    assert change.direction < 1e-15
    assert compare_weights(weight0, weight0) == Change(0.0, 0.0)


def test_rows_of_zeros_count_for_the_magnitude_and_not_for_the_direction():
    weight0, (A, B) = torch.randn(48, 40), factors()
    weight0[3] = 0
    B[3] = torch.tensor([1.0, 2.0, 3.0])
    B[5] = 0
    weight = weight0.double() + 0.5 * B.double() @ A.double()
    assert tuple(compare_low_rank(weight0, A, B, 0.5)) == pytest.approx(truth(weight0, weight), rel=1e-9)
    erased = weight0.clone()
    # the trained row has no direction either
    erased[7] = 0
    assert tuple(compare_weights(weight0, erased)) == pytest.approx((weight0[7].norm().item() / 48, 0), abs=1e-8)
    # nor has W0 + s B A where it is 0 up to rounding
    A, B = factors(dtype=torch.float64)
    weight0 = -0.1 * B @ A
    change = compare_low_rank(weight0, A, B, 0.1)
    assert tuple(change) == pytest.approx((weight0.norm(dim=1).mean().item(), 0.0), abs=0, rel=1e-9)
    nothing = compare_weights(torch.zeros(4, 3), torch.zeros(4, 3))
    assert nothing == Change(0.0, 0.0)


def test_a_diverged_module_does_not_look_unchanged():
    change = compare_weights(torch.ones(3, 2), torch.full((3, 2), math.nan))
    assert math.isnan(change.magnitude)
    assert math.isnan(change.direction)


def test_several_blocks_of_rows(monkeypatch):
    weight0, (A, B) = torch.randn(48, 40), factors()
    weight = weight0 + 0.3 * torch.randn(48, 40)
    whole = compare_weights(weight0, weight), compare_low_rank(weight0, A, B, 0.3)
    # 48 = 6 * 7 + 6
    monkeypatch.setattr(subject, "BLOCK_BYTES", 7 * 40 * 8)
    assert tuple(compare_weights(weight0, weight)) == pytest.approx(whole[0], rel=1e-13)
    assert tuple(compare_low_rank(weight0, A, B, 0.3)) == pytest.approx(whole[1], rel=1e-13)


def test_a_base_that_is_only_a_linear_map():
    layer, (A, B) = nn.Linear(40, 48), factors()
    expected = compare_low_rank(layer.weight, A, B, 0.1)
    found = compare_low_rank(Opaque(layer, 48, 40), A, B, 0.1)
    assert tuple(found) == pytest.approx(expected, rel=1e-4)


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operator creates."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in tensors_in(result)):
            if storage.data_ptr() not in old:
                self.largest = max(self.largest, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_changes_build_no_matrix_of_the_weights_size(dtype, monkeypatch):
    out, inner = 512, 384
    monkeypatch.setattr(subject, "BLOCK_BYTES", 16 * inner * 8)
    weight0, (A, B) = torch.randn(out, inner).to(dtype), factors(out, inner)
    with Largest() as low_rank:
        change = compare_low_rank(weight0, A, B, 0.1, torch.ones(out))
    assert low_rank.largest == 16 * inner * 8
    weight = weight0 + 1
    with Largest() as full:
        compare_weights(weight0, weight)
    assert full.largest == 16 * inner * 8
    weight = weight0.double() + 0.1 * B.double() @ A.double()
    assert tuple(change) == pytest.approx(truth(weight0, weight, torch.ones(out)), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 3), torch.ones(2, 5), torch.ones(4, 2), 1.0), r"A \[r, 3\].*found A \[2, 5\]"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(3, 2), 1.0), r"B \[4, r\].*B \[3, 2\]"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.ones(3)), "4 elements.*found 3"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_low_rank(*arguments)
    with pytest.raises(ValueError, match=r"\(4, 3\).*found \(3, 4\)"):
        compare_weights(torch.ones(4, 3), torch.ones(3, 4))
