"""Each name of torch's does here what it is taken for."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dora_peft.ops import torch_names as subject


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Seeing(TorchDispatchMode):
    """A mode that records nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def within(transform, ask):
    """What `ask` answers while a function of one tensor is computed."""
    answers = []

    def function(x):
        answers.append(ask())
        return x.square().sum()

    transform(function)
    assert answers
    return answers


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(torch.ones(2)),
    "vmap": lambda f: torch.func.vmap(f)(torch.ones(3, 2)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforming(name):
    assert not subject.transforming()
    assert within(TRANSFORMS[name], subject.transforming) == [True]
    assert not subject.transforming()
    assert within(lambda f: f(torch.ones(2)), subject.transforming) == [False]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_state():
    assert subject.jit_state() is None
    found = within(lambda f: torch.jit.trace(f, torch.ones(2), check_trace=False), subject.jit_state)
    assert None not in found
    assert subject.jit_state() is None


def test_modes():
    assert subject.modes() == 0
    with Seeing():
        assert subject.modes() == 1
        with FakeTensorMode():
            assert subject.modes() == 2
    assert subject.modes() == 0


def test_unwrap_dead():
    kept = []
    value = torch.ones(2)
    assert within(lambda f: torch.func.grad(lambda x: kept.append(x) or f(x))(value), lambda: None)
    # a dead wrapper is no plain tensor
    assert torch._C._functorch.is_gradtrackingtensor(kept[0])
    alive = subject.unwrap_dead(kept[0])
    assert not torch._C._functorch.is_gradtrackingtensor(alive)
    assert alive.data_ptr() == value.data_ptr()
    assert subject.unwrap_dead(value) is value


@pytest.mark.skipif(subject.top_hooks is None, reason="this torch does not tell")
def test_top_hooks():
    seen = []
    for context in (save_on_cpu, lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)):
        assert subject.top_hooks(True) is None
        with context():
            assert subject.top_hooks(True) is not None
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: (seen.append(subject.top_hooks(True)), x * x)[1], x, use_reentrant=False)
    assert None not in seen
    assert seen
    assert subject.top_hooks(True) is None


def test_unsafe_view():
    x = torch.arange(6.0)
    found = subject.unsafe_view(x, [2, 3])
    assert torch.equal(found, x.view(2, 3))
    assert found.data_ptr() == x.data_ptr()
    assert not found._is_view()


def test_raw_stream_of_a_torch_without_it(monkeypatch):
    if hasattr(torch._C, "_cuda_getCurrentRawStream"):
        pytest.skip("this torch has it")

    class Stream:
        def __init__(self, index):
            self.cuda_stream = 4096 + index

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert subject.raw_stream(3) == 4099


@pytest.mark.gpu
def test_raw_stream():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert subject.raw_stream(side.device_index) == side.cuda_stream
    assert subject.raw_stream(side.device_index) == torch.cuda.current_stream().cuda_stream


def test_batch_norm_backward():
    """As it is called: y in the place of the input, and only what is asked for."""
    g, y, c = randn(7, 5), randn(7, 5, seed=1), randn(5, seed=2)
    mean = randn(5, seed=3)
    ones = torch.ones(5, dtype=torch.float64)
    for wanted in ([True, True, True], [False, True, False], [True, False, False]):
        scaled, sums, plain = subject.batch_norm_backward(g, y, c, mean, ones, None, None, False, 0.0, wanted)
        for found, expected, asked in zip(
            (scaled, sums, plain), (c * g, (g * (y - mean)).sum(0), g.sum(0)), wanted, strict=True
        ):
            if asked:
                torch.testing.assert_close(found, expected)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize("known", [True, False])
def test_apply_of(known, monkeypatch):
    if not known:
        monkeypatch.delattr(torch._C, "_FunctionBase")
    apply = subject.apply_of(_Product)
    x = torch.ones(3, requires_grad=True)
    y = apply(x, 2.0)
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    y.sum().backward()
    assert torch.equal(y, torch.full((3,), 2.0))
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    # the public one is a method of the class, which looks for transforms; torch's own has no such name in Python
    assert (getattr(apply, "__func__", None) is torch.autograd.Function.apply.__func__) != known


def test_is_recorded():
    def ask(x):
        seen.append(subject.is_recorded())
        return x + 1

    seen = []
    ask(torch.ones(2))
    with Seeing():
        ask(torch.ones(2))
    assert seen == [False, False]
    make_fx(ask)(torch.ones(2))
    with FakeTensorMode():
        ask(torch.ones(2))
    assert seen[2:] == [True, True]


def test_after_backward():
    order = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: (subject.after_backward(lambda: order.append("after")), order.append("within"))[0])
    x.register_post_accumulate_grad_hook(lambda _: order.append("accumulated"))
    y.sum().backward()
    assert order == ["within", "accumulated", "after"]


def test_onednn_linear(monkeypatch):
    operation = subject.onednn_linear()
    if operation is not None and torch.backends.mkldnn.is_available():
        x, weight, bias = (tensor.float() for tensor in (randn(5, 8), randn(6, 8, seed=1), randn(6, seed=2)))
        found = operation(x, weight, bias, "none", [], "")
        torch.testing.assert_close(found, F.linear(x, weight, bias))

    class Without:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    assert subject.onednn_linear() is None


def test_cuda_driver_version(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    assert subject.cuda_driver_version() == 12040
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion")
    assert subject.cuda_driver_version() == 0


@pytest.mark.parametrize(("available", "capturing"), [(False, True), (True, False), (True, True)])
def test_is_capturing(available, capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert subject.is_capturing() == (available and capturing)
