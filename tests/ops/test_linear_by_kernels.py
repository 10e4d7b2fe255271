"""The linear layer's function by Triton's kernels: by a plan in the usual case, by the launchers in all else.

Values and gradients of everything else are what test_linear.py asserts, run with `--implementation triton`.
"""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP32, S, assert_close, randn, tensors
from peft import get_peft_model

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import dora_peft
from dora_peft import reference
from dora_peft.ops import linear_by_kernels as subject
from dora_peft.ops.kernels import fused, plan
from dora_peft.ops.options import options_for


@pytest.fixture(autouse=True)
def _by_kernels():
    plan.forget()
    with dora_peft.implementation("triton"):
        yield
    plan.forget()


class Layer:
    """A linear layer's tensors, A and B in fp32 as PEFT keeps them, and its output by the subject."""

    def __init__(self, dtype=FP32, shape=(2, 20), bias=True, p=0.0):
        _, self.weight, self.bias, A, B, m, self.norm = tensors(dtype)
        self.A, self.B = (t.detach().float().requires_grad_() for t in (A, B))
        self.m, self.p = m, p
        self.x = randn(*shape, 16, dtype=dtype, seed=4).requires_grad_()
        self.bias = self.bias if bias else None
        self.g = randn(*shape, 8, dtype=dtype, seed=9)

    def y(self, x=None):
        x = self.x if x is None else x
        options = options_for(x, self.A, self.B, self.m, S, self.weight, None, None, self.p, None)
        assert options.kernels is fused
        return subject.apply(x, None, self.bias, self.A, self.B, self.m, self.weight, options, self.norm)

    def leaves(self):
        found = (self.x, self.bias, self.A, self.B, self.m)
        return [leaf for leaf in found if leaf is not None and leaf.requires_grad]

    def gradients(self, y, g=None):
        return torch.autograd.grad(y, self.leaves(), self.g if g is None else g)

    def check(self, y, g=None):
        """The output's gradients against the reference in float64, without dropout."""
        found = self.gradients(y, g)
        x, bias, A, B, m = (
            None if leaf is None else leaf.detach().double().requires_grad_(leaf.requires_grad)
            for leaf in (self.x, self.bias, self.A, self.B, self.m)
        )
        truth = reference.dora_linear(x, self.weight.double(), A, B, m, S, bias)
        leaves = [leaf for leaf in (x, bias, A, B, m) if leaf is not None and leaf.requires_grad]
        expected = torch.autograd.grad(truth, leaves, (self.g if g is None else g).double())
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, times=4)


@pytest.fixture
def by_launchers(monkeypatch):
    """How often backward went without a plan."""
    calls, right = [], subject._gradients_of_any_layout
    monkeypatch.setattr(subject, "_gradients_of_any_layout", lambda *args: (calls.append(1), right(*args))[1])
    return calls


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(20,), (2, 20)])
def test_with_a_plan_and_without_it_computes_the_same_bits(shape, dtype, bias, p, by_launchers, monkeypatch):
    def run(count):
        layer = Layer(dtype, shape, bias, p)
        torch.manual_seed(0)
        y = layer.y()
        assert y.shape == (*shape, 8)
        found = [y.detach(), *layer.gradients(y)]
        assert len(by_launchers) == count
        return found

    planned = run(0)
    monkeypatch.setattr(fused, "plan_for", lambda *_: None)
    for one, other in zip(planned, run(1), strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


def frozen(name):
    def prepare(layer):
        getattr(layer, name).requires_grad_(False)

    return prepare


def trained_bias(layer):
    layer.bias = layer.bias.clone().requires_grad_()


def by_columns(layer):
    layer.g = layer.g.transpose(0, 1).contiguous().transpose(0, 1)


# with how often backward goes without a plan
CASES = {
    "usual": (lambda layer: None, 0),
    "x needs no gradient": (frozen("x"), 0),
    "A is frozen": (frozen("A"), 1),
    "B is frozen": (frozen("B"), 1),
    "m is frozen": (frozen("m"), 1),
    "the bias is trained": (trained_bias, 1),
    "the gradient lies by columns": (by_columns, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_unusual_goes_by_the_launchers_and_is_right(case, by_launchers):
    layer = Layer()
    prepare, count = CASES[case]
    prepare(layer)
    layer.check(layer.y())
    assert len(by_launchers) == count


@pytest.mark.parametrize("seen", [True, False])
def test_an_output_that_was_changed_is_not_read(seen):
    """Also behind the back of its version, once a pass has shown that it happens."""
    layer = Layer()
    for _ in range(2):
        y = layer.y()
        with torch.no_grad():
            (y if seen else y.detach()).mul_(-2.0)
        layer.check(y)


@pytest.mark.parametrize("planned", [True, False])
def test_a_base_weight_that_was_changed_is_an_error(planned, monkeypatch):
    if not planned:
        monkeypatch.setattr(fused, "plan_for", lambda *_: None)
    layer = Layer()
    y = layer.y()
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="base weight was changed in place"):
        layer.gradients(y)


def test_autocast_lowers_the_products_and_nothing_within(by_launchers):
    layer, seen = Layer(), []
    forward = fused.forward

    def watched(*args):
        seen.append(torch.is_autocast_enabled(DEVICE))
        return forward(*args)

    with pytest.MonkeyPatch.context() as patch, torch.autocast(DEVICE, BF16):
        patch.setattr(fused, "forward", watched)
        y = layer.y()
        assert torch.is_autocast_enabled(DEVICE)
        found = layer.gradients(y, layer.g.to(BF16))
    assert seen == [False]
    assert y.dtype is BF16
    assert [one.dtype for one in found] == [FP32] * 4
    layer.check(layer.y())
    exact = layer.gradients(layer.y())
    for one, other in zip(found, exact, strict=True):
        assert 1e-4 < (one - other).norm() / other.norm() < 0.03


def test_a_second_derivative_is_refused():
    layer = Layer()
    with pytest.raises(RuntimeError, match=r'create_graph=True.*implementation\("reference"\)'):
        torch.autograd.grad(layer.y().square().sum(), layer.x, create_graph=True)


def test_a_tensor_that_a_transform_has_left_behind_is_taken_as_it_is():
    layer, kept = Layer(), []
    torch.func.grad(lambda x: (kept.append(x), x.square().sum())[1])(layer.x.detach())
    assert torch.equal(layer.y(kept[0]), layer.y())
    # within one, torch says that it cannot follow
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: layer.y(x).sum())(layer.x.detach())


@pytest.mark.parametrize("lost", [False, True])
def test_the_magnitudes_gradient_over_four_bits(lost, monkeypatch):
    """Rows whose bias drowns the rest are computed from the packed weight, without the host's help."""
    bnb = pytest.importorskip("bitsandbytes")
    base = torch.nn.Sequential(torch.nn.Linear(64, 24))
    layer = bnb.nn.Linear4bit(64, 24, compute_dtype=BF16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(base[0].weight.detach().to(BF16).cpu(), requires_grad=False, quant_type="nf4")
    layer.bias = torch.nn.Parameter(torch.full((24,), 1000.0 if lost else 0.1, dtype=BF16), requires_grad=False)
    base[0] = layer
    model = get_peft_model(base, dora_peft.DoraConfig(r=3, target_modules=["0"])).to(DEVICE)
    dora = model.base_model.model[0]
    torch.nn.init.normal_(dora.lora_B["default"].weight)
    dora_peft.refresh(model)
    # the path that waits
    monkeypatch.setattr(subject, "magnitude_gradient", None)
    x, probe = randn(40, 64).to(BF16), randn(40, 24, seed=1)
    model(x).float().backward(probe)
    found = dora.lora_magnitude_vector["default"].weight.grad
    W0, (A, B) = dora.base_weight().dense().double(), (f.detach().double() for f in dora.factors("default"))
    direction = W0 + dora.scaling["default"] * B @ A
    expected = (probe.double() * (x.double() @ direction.T)).sum(0) / direction.norm(dim=1)
    assert (found - expected).norm() < 0.02 * expected.norm()
