"""Dropout's masks and the three products with them, against float64."""

import platform

import pytest
import torch
from kernel_fixtures import ALL, BF16, DEVICE, DTYPES, FP32, P, Tensors, assert_close, poisoned_memory, randn  # noqa: F401 - a fixture

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels import dropout


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_mask_statistics(p):
    shape = torch.Size([300, 257])
    mask = dropout.drawn_mask(shape, seed(1), p, DEVICE)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    n, kept = mask.numel(), dropout.threshold(p)[1]
    deviation = (kept * (1 - kept) / n) ** 0.5
    assert abs(mask.mean().item() - kept) < 5 * deviation
    centred = mask - kept
    for one, other in [
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[:, 8:], centred[:, :-8]),
    ]:
        correlation = (one * other).mean().item() / (kept * (1 - kept))
        assert abs(correlation) < 5 / n**0.5
    assert not torch.equal(mask, dropout.drawn_mask(shape, seed(2), p, DEVICE))
    # whatever the block
    assert torch.equal(mask[:7, :9], dropout.drawn_mask(torch.Size([7, 9]), seed(1), p, DEVICE))


def test_masks_of_nothing_and_of_all():
    assert dropout.drawn_mask(torch.Size([9, 17]), seed(1), 0.0, DEVICE).all()
    assert not dropout.drawn_mask(torch.Size([9, 17]), seed(1), 1.0, DEVICE).any()


def test_seeds_follow_torchs():
    torch.manual_seed(5)
    one, other = dropout.draw_seed(torch.device(DEVICE)), dropout.draw_seed(torch.device(DEVICE))
    torch.manual_seed(5)
    assert dropout.draw_seed(torch.device(DEVICE)) == one
    assert one != other
    torch.set_default_device("meta")
    try:
        assert isinstance(dropout.draw_seed(torch.device(DEVICE)), int)
    finally:
        torch.set_default_device(None)


def seed(number):
    return torch.tensor([number], dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize(("dtype", "factors"), DTYPES)
def test_products_with_dropout(dtype, factors, size):
    """One mask in all three, though they go through x in blocks of different shapes."""
    t = Tensors(size, dtype, factors)
    mask = dropout.drawn_mask(t.x.shape, seed(3), P, DEVICE).double()
    A, dropped = t.A.to(dtype).double(), mask * t.x.double()
    assert_close(dropout.dropped_product(t.x, t.A, seed(3), P), dropped @ A.T)
    du = randn(size[0], size[3], dtype=dtype, seed=8)
    d_A = dropout.dropped_gradient(du, t.x, seed(3), P, factors)
    assert d_A.dtype is factors
    assert_close(d_A, du.double().T @ dropped)
    low_rank = mask * (du.double() @ A)
    assert_close(dropout.add_low_rank(None, du, t.A, seed(3), P), low_rank)
    dx = randn(*t.x.shape, dtype=dtype, seed=9)
    expected = dx.double() + low_rank
    assert dropout.add_low_rank(dx, du, t.A, seed(3), P) is dx
    assert_close(dx, expected)


@pytest.mark.parametrize("factors", [FP32, BF16])
@pytest.mark.parametrize("length", [256, 257, 700])
def test_the_gradient_is_summed_over_stripes_of_tokens(length, factors):
    t = Tensors((length, 33, 8, 20), BF16, factors)
    mask = dropout.drawn_mask(t.x.shape, seed(3), P, DEVICE).double()
    du = randn(length, 20, dtype=BF16, seed=8)
    found = dropout.dropped_gradient(du, t.x, seed(3), P, factors)
    assert found.dtype is factors
    assert_close(found, du.double().T @ (mask * t.x.double()))
    # deterministic
    assert torch.equal(dropout.dropped_gradient(du, t.x, seed(3), P, factors), found)


@pytest.mark.parametrize("number", [3, 2**32 + 1, 2**62 - 1])
def test_seeds_on_the_host_and_on_the_device_draw_the_same_mask(number):
    shape = torch.Size([70, 33])
    mask = dropout.drawn_mask(shape, number, P, DEVICE)
    assert torch.equal(mask, dropout.drawn_mask(shape, seed(number), P, DEVICE))
    t = Tensors((70, 33, 8, 5))
    for function, inputs in [
        (dropout.dropped_product, (t.x, t.A)),
        (lambda *args: dropout.dropped_gradient(*args, FP32), (t.u, t.x)),
    ]:
        both = [function(*inputs, at, P) for at in (number, seed(number))]
        assert torch.equal(*both)


def test_products_with_dropout_of_a_strided_input():
    t = Tensors((17, 33, 8, 5))
    wide = torch.stack([t.x, -t.x], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(dropout.dropped_product(wide, t.A, seed(3), P), dropout.dropped_product(t.x, t.A, seed(3), P))
    du = randn(17, 5)
    results = [dropout.dropped_gradient(du, x, seed(3), P, FP32) for x in (wide, t.x.T.contiguous().T, t.x)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_no_tokens():
    t = Tensors((0, 9, 7, 3))
    assert dropout.dropped_product(t.x, t.A, seed(3), P).shape == (0, 3)
    assert not dropout.dropped_gradient(t.u, t.x, seed(3), P, FP32).any()
