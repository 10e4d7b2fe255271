"""What the linear function keeps for its backward pass, and for how long."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from covering import pairs
from linear_fixtures import (
    BF16,
    FLOOR,
    FORMS,
    FP32,
    FP64,
    Made,
    Problem,
    S,
    assert_equal_gradients,
    by_kernels,
    gradients,
    identity_hooks,
    randn,
)
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dora_peft.ops import kept_output
from dora_peft.ops import linear as subject
from dora_peft.ops.chunks import CHUNK

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@contextmanager
def no_garbage_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("context", [nullcontext, save_on_cpu, identity_hooks])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_the_output_is_released_after_backward(form, shape, context):
    problem = Problem(*shape)
    probe = randn(*shape, 7, seed=9)
    with no_garbage_collection():
        with context():
            y = problem.y(form)
        storage = StorageWeakRef(y.untyped_storage())
        loss = (y * probe).sum()
        del y
        # save_on_cpu keeps a copy.
        if context is not save_on_cpu:
            # kept for backward, by nothing else
            assert not storage.expired()
        loss.backward()
        assert loss.grad_fn is not None
        assert storage.expired()


def copying_hooks():
    return saved_tensors_hooks(torch.clone, lambda tensor: tensor)


# torch's own x.exp() leaks where hooks do not copy
@pytest.mark.parametrize("context", [nullcontext, copying_hooks])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["before backward", "between two", "changed"])
def test_no_reference_cycle_keeps_the_output(form, context, when):
    problem = Problem(2, 3)
    with no_garbage_collection():
        with context():
            y = problem.y(form, dropout_p=0.5)
        storage = StorageWeakRef(y.untyped_storage())
        if when == "between two":
            y.sum().backward(retain_graph=True)
        if when == "changed":
            y.mul_(2.0)
        assert not storage.expired()
        del y
        assert storage.expired()


@pytest.mark.parametrize(
    ("n", "dtype", "form", "surroundings", "dropout_p"),
    pairs([5, CHUNK + 1], [FP64, FP32, BF16], FORMS, ["plain", "autocast"], [0.0, 0.5]),
)
def test_what_is_kept_for_backward(n, dtype, form, surroundings, dropout_p):
    """y and u, some of y's elements again, and for dropout a byte an element of x, by kernels nothing: no copy of x,
    nothing of W0's size."""
    problem = Problem(n, width=33, out=29, dtype=dtype)
    x, A, B, c, bias = problem.parts()
    with torch.autocast("cpu", dtype=BF16, enabled=surroundings == "autocast"):
        base_out = F.linear(x, problem.weight, bias).detach().requires_grad_()
        base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out, "base_product": None}
        with no_garbage_collection(), Made() as made:
            y = subject.linear(x, A, B, c, S, bias=bias, dropout_p=dropout_p, **base)
    assert y.dtype == (BF16 if surroundings == "autocast" and dtype is not FP64 else dtype)
    # Kernels draw the mask again from its seed.
    mask = [] if by_kernels(dtype) else [n * 33] * (dropout_p > 0)
    if by_kernels(dtype):
        # Triton's interpreter leaves reference cycles
        gc.collect()
    sample = [part.numel() * y.itemsize for part in kept_output._parts(y, 0, 0) if part.numel()]
    assert sum(sample) <= (2048 + 1024) * y.itemsize
    if by_kernels(dtype) and form == "weight" and y.dtype == dtype:
        # in one piece, each part at a multiple of 16 bytes
        first, *second = sample
        sample = [16 + -(-first // 16) * 16 + sum(second)]
    expected = [n * 29 * y.itemsize, n * 3 * y.itemsize, *sample, *mask]
    given = (x, A, B, c, bias, problem.weight, base_out)
    assert made.alive(*given) == sorted(expected)
    assert made.alive(*given, y) == sorted(expected[1:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_what_goes_through_hooks(form, dropout_p):
    """The same: x, the parameters and c as they are given, not copies; y, its sample and where that is from; u; mask.
    W0 stays where it is."""
    problem = Problem(2, 5, width=33, out=29, dtype=BF16, factors=FP32)
    x, A, B, c, bias = problem.parts()
    base_out = F.linear(x, problem.weight, bias).detach()
    base = {"weight": problem.weight} if form == "weight" else {"base_out": base_out, "base_product": None}
    packed = []
    with saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor):
        y = subject.linear(x, A, B, c, S, bias=bias, dropout_p=dropout_p, **base)
    given = [tensor.data_ptr() for tensor in (x, A, B, c, bias, y)]
    assert sorted(t.data_ptr() for t in packed if t.data_ptr() in given) == sorted(given)
    made = [(tuple(t.shape), t.dtype) for t in packed if t.data_ptr() not in given]
    masks = 0 if by_kernels(BF16) else dropout_p > 0
    sample = [((10, 29), BF16), ((2,), torch.int64)]
    assert sorted(made, key=str) == sorted([((10, 3), BF16), *sample, *[((10, 33), torch.bool)] * masks], key=str)


@pytest.mark.parametrize("context", [nullcontext, identity_hooks])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_base_weight_changed_before_backward_raises(transposed, context):
    problem = Problem(6)
    stored = problem.weight.T.contiguous() if transposed else problem.weight
    problem.weight = stored.T if transposed else stored
    with context():
        y = problem.y()
    stored.mul_(1.0)
    with pytest.raises(RuntimeError, match=r"base weight was changed in place.*\[7, 9\]"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["x", "A", "B", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_an_input_changed_before_backward_raises(form, name):
    problem = Problem(6)
    y = problem.y(form)
    with torch.no_grad():
        problem.leaves[name].mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_base_weight_made_in_inference_mode():
    """As a model that was loaded there: such tensors have no version and cannot be saved for backward."""
    problem = Problem(6)
    with torch.inference_mode():
        problem.weight = problem.weight.clone()
    y = problem.y()
    probe = randn(6, 7, seed=9)
    found = problem.gradients(y, probe)
    problem.weight = problem.weight.clone()
    truth, leaves = problem.truth()
    assert_equal_gradients(found, gradients(truth, leaves, probe), FLOOR[FP64])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_without_gradients(dropout_p, form, mode):
    problem = Problem(2, 3)
    torch.manual_seed(1)
    expected = problem.y(form, dropout_p=dropout_p)
    torch.manual_seed(1)
    with mode():
        y = problem.y(form, dropout_p=dropout_p)
    assert y.grad_fn is None
    assert torch.equal(y, expected)
