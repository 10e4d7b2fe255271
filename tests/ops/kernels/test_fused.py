"""The linear layer by Triton kernels: how many it launches, the operators for torch.compile, and CUDA graphs.

That values and gradients are right is what tests/ops/test_linear.py asserts, run with `--implementation triton`.
"""

import platform
from itertools import product

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import dora_peft
from dora_peft import reference
from dora_peft.ops import linear
from dora_peft.ops.kernels import dropout as dropout_kernels
from dora_peft.ops.kernels import fused as subject
from dora_peft.ops.kernels import linear as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
S = 0.7


@pytest.fixture(autouse=True)
def _by_kernels():
    with dora_peft.implementation("triton"):
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tensors(dtype=FP32, length=6, width=16, out=8, r=3):
    """x, W0, b, A, B, m and v, those that are trained with a gradient."""
    weight, A, B = randn(out, width, seed=1), randn(r, width, seed=2), randn(out, r, seed=3)
    norm = reference.weight_norm(weight, A, B, S)
    leaves = [randn(length, width, seed=4), randn(out, seed=5), A, B]
    x, bias, A, B = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    return x, weight.to(dtype), bias.detach(), A, B, norm.clone().requires_grad_(), norm


class Launches(TorchDispatchMode):
    """Operations that launch a kernel on a GPU; views and allocations do not."""

    NOT = ("empty", "view", "detach", "alias", "transpose", "expand", "t", "as_strided", "slice", "unsafe_view")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if not name.startswith(self.NOT) or name.startswith("threshold"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


KERNELS = (
    "_compose",
    "_scale_and_sum",
    "_magnitude_gradient",
    "_dropped_product",
    "_add_low_rank",
    "_dropped_gradient",
    "_take_sample",
    "_compare_sample",
)


@pytest.fixture
def launched(monkeypatch):
    """The names of the Triton kernels that were launched."""
    names = []

    class Counted:
        def __init__(self, module, name):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        module = kernels if hasattr(kernels, name) else dropout_kernels
        monkeypatch.setattr(module, name, Counted(module, name))
    return names


@pytest.mark.skipif(DEVICE == "cuda", reason="the next test counts on the GPU itself")
@pytest.mark.parametrize(("p", "forward", "backward"), [(0.0, 5, 9), (0.1, 5, 9)])
def test_how_many_kernels_a_layer_launches(launched, p, forward, backward):
    """c = m / v, two products and one kernel; one pass, the magnitude's gradient, five products, m's. Dropout costs
    none more: its seed is a number on the host. In the interpreter each kernel counts by its launch, not by what it
    computes on the CPU."""
    x, weight, bias, A, B, m, v = tensors(BF16)
    with Launches() as torchs:
        before = len(torchs.names)
        c = m / v
        y = linear.linear(x, A, B, c, S, weight=weight, bias=bias, dropout_p=p)
    own = [name for name in torchs.names[before:] if name in ("div", "linear", "addmm", "mm")]
    assert launched.count("_compose") == 1
    assert len(own) + len(launched) == forward, (own, launched)
    launched.clear()
    grad = torch.ones_like(y)
    with Launches() as torchs:
        torch.autograd.grad(y, (x, A, B, m), grad)
    own = [name for name in torchs.names if name in ("div", "mul", "linear", "addmm", "addmm_", "mm", "sum")]
    assert len(own) + len(launched) == backward, (own, launched)


@pytest.mark.gpu
@pytest.mark.parametrize(("p", "forward", "backward"), [(0.0, 5, 10), (0.1, 5, 10)])  # one fills a number
def test_how_many_kernels_run(p, forward, backward):
    x, weight, bias, A, B, m, v = tensors(BF16, 2048, 4096, 4096, 16)

    def run():
        y = linear.linear(x, A, B, m / v, S, weight=weight, bias=bias, dropout_p=p)
        return y, torch.ones_like(y)

    def kernels_in(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = function()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type.name == "CUDA" and "Memset" not in e.name]
        return result, [name for name in names if "splitK" not in name]  # cuBLAS's own second stages

    torch.autograd.grad(run()[0].sum(), (x, A, B, m))  # tunes
    (y, grad), names = kernels_in(run)
    assert len(names) - 1 <= forward, names  # one fills the gradient
    _, names = kernels_in(lambda: torch.autograd.grad(y, (x, A, B, m), grad))
    assert len(names) <= backward, names


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_waits_for_the_host(p):
    x, weight, bias, A, B, m, v = tensors(BF16, 300, 64, 128, 16)

    def step():
        y = linear.linear(x, A, B, m / v, S, weight=weight, bias=bias, dropout_p=p)
        return torch.autograd.grad(y.float().square().sum(), (x, A, B, m))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_cuda_graph_replays_a_step(p):
    x, weight, bias, A, B, m, v = tensors(BF16, 300, 64, 128, 16)

    def step():
        y = linear.linear(x, A, B, m / v, S, weight=weight, bias=bias, dropout_p=p)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), (x, A, B, m))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, found = step()
    with torch.no_grad():
        x.copy_(randn(*x.shape, seed=9))
    graph.replay()
    if p == 0:
        expected_y, expected = step()
        assert torch.equal(y, expected_y)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    else:
        before = y.clone()
        graph.replay()
        assert not torch.equal(before, y)  # another mask


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_keep_torchs_rules(bias, p):
    x, weight, b, A, B, m, v = tensors()
    seed = torch.tensor([2**40 + 1], device=x.device) if p else None
    c = (m / v).detach().requires_grad_()
    args = (x, weight, b if bias else None, A, B, c, seed, S, p, 7)
    torch.library.opcheck(torch.ops.dora_peft.linear.default, args)


@pytest.mark.parametrize("needed", list(product([False, True], repeat=4))[1:])
def test_the_operator_gives_what_the_function_gives(needed):
    x, weight, bias, A, B, m, v = tensors()
    for leaf, need in zip((x, A, B, m), needed, strict=True):
        leaf.requires_grad_(need)
    leaves = [leaf for leaf, need in zip((x, A, B, m), needed, strict=True) if need]
    expected = linear.linear(x, A, B, m / v, S, weight=weight, bias=bias)
    found = linear.linear_operator(x, weight, bias, A, B, m / v, S, 0.0, 7)
    assert torch.equal(found, expected)
    probe = randn(*found.shape, seed=8)
    gradients = zip(
        torch.autograd.grad(found, leaves, probe), torch.autograd.grad(expected, leaves, probe), strict=True
    )
    for one, other in gradients:
        assert torch.equal(one, other)


def test_the_operator_sees_that_its_output_was_overwritten():
    """By a kernel outside of the compiled graph, by raw pointer."""
    x, weight, bias, A, B, m, v = tensors()
    probe = randn(len(x), len(weight), seed=8)
    expected = torch.autograd.grad(linear.linear(x, A, B, m / v, S, weight=weight, bias=bias), (x, A, B, m), probe)
    y = linear.linear_operator(x, weight, bias, A, B, m / v, S, 0.0, 7)
    y.detach().view(-1).data.mul_(3) if DEVICE != "cpu" else y.detach().numpy().__imul__(3)
    for one, other in zip(torch.autograd.grad(y, (x, A, B, m), probe), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_fake_operators_know_shapes_and_dtypes():
    x, weight, bias, A, B, m, v = tensors(BF16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y, u, rows, diagonal = torch.ops.dora_peft.linear(
            x.new_empty(2, 3, 16), weight, bias, A, B, m / v, None, S, 0.0, 7
        )
    assert (y.shape, y.dtype) == ((2, 3, 8), BF16)
    assert (u.shape, u.dtype) == ((6, 3), BF16)
    assert (rows.shape, rows.dtype) == ((6, 8), BF16)
    assert (diagonal.shape, diagonal.dtype) == ((6 * 8 // 9,), BF16)
    assert subject.forward(x, None, weight, bias, A, B, m / v, S, None, 0.0)[1].shape == (6, 3)


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
    monkeypatch.setattr(linear, "magnitude_gradient", None)  # the path that waits
    x, probe = randn(40, 64).to(BF16), randn(40, 24, seed=1)
    model(x).float().backward(probe)
    found = dora.lora_magnitude_vector["default"].weight.grad
    W0, (A, B) = dora.base_weight().dense().double(), (f.detach().double() for f in dora.factors("default"))
    direction = W0 + dora.scaling["default"] * B @ A
    expected = (probe.double() * (x.double() @ direction.T)).sum(0) / direction.norm(dim=1)
    assert (found - expected).norm() < 0.02 * expected.norm()
