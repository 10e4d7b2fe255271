"""Memory that is kept from call to call: equal for equal purposes, of one thread, and in no result."""

import threading

import pytest
import torch
from linear_fixtures import FP32, FP64, Problem, S
from torch._subclasses.fake_tensor import FakeTensorMode

from dora_peft.ops import linear, workspace
from dora_peft.ops.workspace import workspace as memory_for

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def empty_workspace(monkeypatch):
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_equal_purposes_share_memory_and_others_do_not():
    first, second = memory_for("a", (3, 5), LIKE), memory_for("b", (3, 5), LIKE)
    assert first.shape == (3, 5)
    assert first.dtype is FP32
    assert address(memory_for("a", (3, 5), LIKE)) == address(first) != address(second)
    assert address(memory_for("a", (2, 2), LIKE.double())) == address(first)
    grown = memory_for("a", (30, 5), LIKE)
    assert address(memory_for("a", (3, 5), LIKE)) == address(grown)


def test_at_most_so_much_is_kept(monkeypatch):
    monkeypatch.setattr(workspace, "MOST_BYTES", 400)
    kept = memory_for("a", (100,), LIKE)
    large = memory_for("a", (101,), LIKE)
    assert address(large) not in (address(kept), address(memory_for("a", (101,), LIKE)))
    assert sum(memory.numel() for memory in workspace._kept.memory.values()) == 400


def test_each_thread_has_its_own():
    own, others = memory_for("a", (8,), LIKE), []
    thread = threading.Thread(target=lambda: others.append(memory_for("a", (8,), LIKE)))
    thread.start()
    thread.join()
    assert address(others[0]) != address(own)


def test_what_inference_mode_asked_for_first_can_be_written_to_later():
    with torch.inference_mode():
        memory_for("a", (8,), LIKE)
    memory_for("a", (8,), LIKE).fill_(1)


def test_tensors_without_memory_get_their_own_kind():
    with FakeTensorMode() as mode:
        fake = torch.empty(4)
        assert isinstance(memory_for("a", (8,), fake), type(fake))
        assert mode is not None
    assert memory_for("a", (8,), torch.empty(1, device="meta")).is_meta


@pytest.mark.implementation("torch")
@pytest.mark.parametrize("n", [7, 80, 200])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_no_result_lies_in_it(n, p, dtype):
    problem = Problem(n, width=33, out=29, dtype=dtype, bias=True, seed=1)
    x, A, B, c, b = problem.parts()
    y = linear.linear(x, A, B, c, S, weight=problem.weight, bias=b, dropout_p=p)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    gradients = torch.autograd.grad(y, [x, A, B, c, b], torch.randn_like(y))
    used = {address(memory) for memory in workspace._kept.memory.values()}
    assert used or n == 7
    assert used.isdisjoint(address(tensor) for tensor in (y, *kept, *gradients))
