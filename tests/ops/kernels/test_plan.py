"""A plan computes what the kernels' own launchers compute, bit for bit, and only the usual case has one."""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP32, randn

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels import fused, plan
from dora_peft.ops.kernels.options import KernelOptions
from dora_peft.ops.kernels.sample import changed

S, SEED = 0.5, 2**40 + 1


@pytest.fixture(autouse=True)
def _forgotten():
    plan.forget()
    yield
    plan.forget()


def layer(dtype=BF16, factors=FP32, shape=(2, 20), bias=True, rank=3):
    """x, W0, b, A, B and c."""
    width, out = 24, 40
    return [
        randn(*shape, width, dtype=dtype, seed=1),
        randn(out, width, dtype=dtype, seed=2),
        randn(out, dtype=dtype, seed=3) if bias else None,
        randn(rank, width, dtype=factors, seed=4),
        randn(out, rank, dtype=factors, seed=5),
        1 + randn(out, seed=6).tanh() / 2,
    ]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "factors"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("shape", [(20,), (2, 20), (300,)])
def test_it_computes_what_the_launchers_compute(shape, dtype, factors, bias, p):
    x, weight, b, A, B, c = layer(dtype, factors, shape, bias)
    seed = SEED if p else None
    options = KernelOptions.of(S, p, seed, (True, False, False, True, True, True))
    rows, g = x.flatten(0, -2), randn(*shape, 40, dtype=dtype, seed=7)
    y, u = fused.forward(rows, None, weight, b, A, B, c, options)
    expected = fused.gradients(
        g.flatten(0, -2), rows, u, y, weight, b, A, B, c, options, stored=weight, d_magnitude=None
    )  # fmt: skip
    made = plan.plan_for(x, weight, b, A, B, c, p)
    # a second time as well: what is worked out once has to hold
    for _ in range(2):
        found, u_found = made.forward(x, weight, b, A, B, c, options.k, seed)
        assert found.shape == (*shape, 40)
        assert not found._is_view()
        assert torch.equal(found.flatten(0, -2), y)
        assert torch.equal(u_found, u)
        kept, offset, start = made.keep_sample(found)
        made.find_change(found, kept, offset, start)
        assert not changed(kept)
        gradients = made.gradients(g, found, x, u, weight, b, A, B, c, options.k, seed, kept, True)
        for one, other in zip(gradients, (expected[0].view(x.shape), *expected[3:]), strict=True):
            assert torch.equal(one.to(other.dtype), other)
        behind = found.clone()
        behind.view(-1)[offset] += 1
        made.find_change(behind, kept, offset, start)
        assert changed(kept)


def test_equal_layers_share_a_plan():
    assert plan.plan_for(*layer(), 0.0) is plan.plan_for(*(None if t is None else t.clone() for t in layer()), 0.0)


OTHERS = {
    "shape": lambda: (*layer(shape=(3, 20)), 0.0),
    "dtype": lambda: (*layer(FP32), 0.0),
    "factors": lambda: (*layer(factors=BF16), 0.0),
    "rank": lambda: (*layer(rank=4), 0.0),
    "bias": lambda: (*layer(bias=False), 0.0),
    "dropout": lambda: (*layer(), 0.1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_layouts_have_a_plan_of_their_own(what):
    first, other = plan.plan_for(*layer(), 0.0), plan.plan_for(*OTHERS[what]())
    assert first is not None
    assert other is not None
    assert first is not other


@pytest.mark.skipif(DEVICE == "cuda", reason="reads a setting of torch's for GPUs")
def test_another_precision_of_products_is_another_plan():
    before = torch.backends.cuda.matmul.allow_tf32
    found = []
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found.append(plan.plan_for(*layer(FP32), 0.0))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert found[0] is not found[1]


def changed_layer(**others):
    found = dict(zip(("x", "weight", "bias", "lora_A", "lora_B", "c"), layer(), strict=True))
    return [*(found | others).values(), 0.0]


UNUSUAL = {
    "x by columns": lambda: changed_layer(x=layer()[0].transpose(0, 1)),
    "one token alone": lambda: changed_layer(x=layer()[0][0, 0]),
    "no token": lambda: changed_layer(x=layer()[0][:, :0]),
    "another dtype of W0": lambda: changed_layer(weight=layer(FP32)[1]),
    "another dtype of b": lambda: changed_layer(bias=layer(FP32)[2]),
    "A by columns": lambda: changed_layer(lora_A=layer()[3].T.contiguous().T),
    "B by columns": lambda: changed_layer(lora_B=layer()[4].T.contiguous().T),
    "many ranks": lambda: [*layer(rank=65), 0.0],
    "c in fp64": lambda: changed_layer(c=layer()[5].double()),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_the_unusual_has_none(what):
    assert plan.plan_for(*UNUSUAL[what]()) is None


def test_plans_are_forgotten_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(plan, "_MOST", 3)
    for length in range(2, 9):
        plan.plan_for(*layer(shape=(length,)), 0.0)
        assert len(plan._plans) <= 3
