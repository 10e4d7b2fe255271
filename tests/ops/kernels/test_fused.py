"""The linear layer by Triton kernels: how many it launches, that it waits for nothing, and CUDA graphs.

That values and gradients are right is what tests/ops/test_linear.py asserts, run with `--implementation triton`.
"""

import platform

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, S, randn, tensors
from torch.utils._python_dispatch import TorchDispatchMode

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import dora_peft
from dora_peft.ops import linear
from dora_peft.ops.kernels import dropout as dropout_kernels
from dora_peft.ops.kernels import linear as kernels
from dora_peft.ops.kernels import plan, sample


@pytest.fixture(autouse=True)
def _by_kernels():
    with dora_peft.implementation("triton"):
        yield


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
    "_scaled_sum_of_few_ranks",
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
        module = next(one for one in (kernels, dropout_kernels, sample) if hasattr(one, name))
        monkeypatch.setattr(module, name, Counted(module, name))
    # an earlier one goes to the driver by itself
    plan.forget()
    yield names
    plan.forget()


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
    assert launched.count("_scaled_sum_of_few_ranks") == 1
    assert len(own) + len(launched) == forward, (own, launched)
    launched.clear()
    grad = torch.ones_like(y)
    with Launches() as torchs:
        torch.autograd.grad(y, (x, A, B, m), grad)
    own = [name for name in torchs.names if name in ("div", "mul", "linear", "addmm", "addmm_", "mm", "sum")]
    assert len(own) + len(launched) == backward, (own, launched)


@pytest.mark.gpu
# one fills a number
# with dropout, the gradient of A is the sum of stripes, and rounded
@pytest.mark.parametrize(("p", "forward", "backward"), [(0.0, 5, 10), (0.1, 5, 12)])
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
        # cuBLAS's own second stages
        return result, [name for name in names if "splitK" not in name]

    # tunes
    torch.autograd.grad(run()[0].sum(), (x, A, B, m))
    (y, grad), names = kernels_in(run)
    # one fills the gradient
    assert len(names) - 1 <= forward, names
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
        # another mask
        assert not torch.equal(before, y)
