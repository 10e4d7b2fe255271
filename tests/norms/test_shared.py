"""A new norm from the product with W0 that the forward pass makes anyway, with the rows of A beside those of x."""

from itertools import pairwise

import pytest
import torch
from layer_fixtures import FLOOR, adapted
from torch.utils.checkpoint import checkpoint

import dora_peft
from dora_peft.ops import norm, products

pytestmark = [pytest.mark.implementation("torch"), pytest.mark.cached_norms]
KINDS = ["linear", "linear-no-bias", "Conv1D"]
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def beside(monkeypatch):
    """Every forward pass that needs a new norm takes it from its product; the products are recorded."""
    found, original = [], norm.norm_beside_product

    def recorded(*args):
        found.append(args[6].shape)
        return original(*args)

    monkeypatch.setattr(norm, "norm_beside_product", recorded)
    monkeypatch.setattr(products, "beside_rows", lambda weight, rank: 10**6)
    return found


def trained(model, steps=4, forward=None):
    """Losses and gradients of some steps, each on another batch."""
    generator, found = torch.Generator().manual_seed(1), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(steps):
        x = torch.randn(3, 5, 12, generator=generator, dtype=FP64).to(parameters[0].dtype).requires_grad_()
        optimizer.zero_grad()
        torch.manual_seed(2)
        loss = (model if forward is None else forward)(x).square().sum()
        loss.backward()
        found += [loss.detach(), x.grad, *(p.grad.clone() for p in parameters)]
        optimizer.step()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_training_as_with_the_dense_norm(kind, dtype, beside):
    found = trained(adapted(kind, dtype))
    assert beside == [(15, 12)] * 4
    with dora_peft.implementation("reference"):
        expected = trained(adapted(kind, dtype))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 20 * FLOOR[dtype] * other.norm()


def test_training_under_dropout_as_without_sharing(beside, monkeypatch):
    found = trained(adapted("linear", FP64, lora_dropout=0.5))
    assert len(beside) == 4
    monkeypatch.setattr(products, "beside_rows", lambda weight, rank: 0)
    for one, other in zip(found, trained(adapted("linear", FP64, lora_dropout=0.5)), strict=True):
        torch.testing.assert_close(one, other)
    assert len(beside) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_norm_a_step_under_checkpointing(beside, reentrant):
    model = adapted("linear", FP64)
    plain = trained(adapted("linear", FP64))
    beside.clear()
    found = trained(model, forward=lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert len(beside) == 4
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_cancel_are_computed_densely(beside):
    model = adapted("linear", FP32)
    layer = model.base_model.model.layer
    with torch.no_grad():
        # W0 + s B A = 0.001 W0 in every row
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = layer.base_layer.weight
        weight.copy_(-layer.scaling["default"] / 0.999 * (B @ A))
    dora_peft.refresh(model)
    x = torch.randn(2, 12)
    with dora_peft.checking():
        y = model(x)
    assert len(beside) == 1
    with dora_peft.implementation("reference"):
        expected = model(x)
    assert (y - expected).norm() <= 1e-3 * expected.norm()
    value = layer._norms["default"].known.value
    exact = (weight.double() + layer.scaling["default"] * B.double() @ A.double()).norm(dim=1)
    assert ((value - exact).abs() / exact).max() < 1e-3


def test_an_untrained_adapter_gives_the_base_layers_bits(beside):
    model = adapted("linear", FP32)
    layer = model.base_model.model.layer
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.lora_magnitude_vector["default"].weight.copy_(layer.base_layer.weight.norm(dim=1))
    x = torch.randn(30, 12)
    assert torch.equal(model(x), layer.base_layer(x))
    assert not beside


@pytest.mark.parametrize("case", ["low precision", "autocast", "evaluation"])
def test_where_nothing_is_shared(beside, case):
    dtype = BF16 if case == "low precision" else FP32
    model, x = adapted("linear", dtype), torch.randn(4, 12, dtype=dtype)
    model.train(case != "evaluation")
    with torch.set_grad_enabled(case != "evaluation"), torch.autocast("cpu", enabled=case == "autocast"):
        model(x)
    assert not beside


def test_wide_layers_share_for_few_tokens_and_narrow_ones_never():
    bound = products.beside_rows
    for narrow, wide in pairwise([16, 64, 256, 1024, 4096]):
        few, many = (bound(torch.empty(size, size, device="meta"), 16) for size in (narrow, wide))
        assert few <= many
    assert bound(torch.empty(16, 16, device="meta"), 16) == 0 < bound(torch.empty(4096, 4096, device="meta"), 16)
    assert bound(torch.empty(0, 16, device="meta"), 16) == 0
