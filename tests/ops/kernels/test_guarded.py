"""Guarded memory shows what was left out and what was written beside a tensor."""

import pytest
import torch
from kernel_fixtures import BF16, DEVICE, FP16, FP32

from dora_peft.ops.kernels.guarded import GUARD, Guarded


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_what_is_allocated_is_poisoned_unless_it_is_zero(dtype):
    options = {"dtype": dtype, "device": DEVICE}
    like = torch.ones(3, 5, **options)
    with Guarded() as memory:
        empty = [torch.empty(3, 5, **options), torch.empty_like(like), like.new_empty(3, 5)]
        empty.append(torch.empty_strided((3, 5), (1, 3), **options))
        zero = [torch.zeros(3, 5, **options), torch.zeros_like(like), like.new_zeros(3, 5)]
    assert all(tensor.isnan().all() for tensor in empty)
    assert all((tensor == 0).all() for tensor in zero)
    assert all((tensor.shape, tensor.dtype) == ((3, 5), dtype) for tensor in empty + zero)
    assert empty[3].stride() == (1, 3)
    assert not memory.overrun()


def test_whole_numbers_are_poisoned_as_well():
    with Guarded():
        assert (torch.empty(3, dtype=torch.int64, device=DEVICE) == -1).all()


def test_a_tensor_that_is_placed_keeps_its_numbers_and_its_layout():
    tensor = torch.arange(6.0, device=DEVICE).view(2, 3).T
    placed = Guarded().place(tensor)
    assert torch.equal(placed, tensor)
    assert placed.stride() == tensor.stride()
    assert placed.data_ptr() != tensor.data_ptr()
    # as aligned as torch's own memory, for which kernels are compiled
    assert placed.storage_offset() * placed.element_size() % 512 == 0


def test_a_tensor_without_elements_stays_as_it_is():
    tensor = torch.empty(0, 3, device=DEVICE)
    assert Guarded().place(tensor) is tensor


@pytest.mark.parametrize("place", [-GUARD // 4, -1, 6, 6 + GUARD // 4 - 1])
def test_a_write_to_a_guard_is_seen_once(place):
    with Guarded() as memory:
        tensors = [torch.empty(2, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE)]
    for tensor in tensors:
        memory.place(tensor)
    tensors[1].fill_(7)
    assert not memory.overrun()
    placed = memory.place(tensors[1])
    placed.as_strided((1,), (1,), placed.storage_offset() + place).fill_(torch.nan)
    assert memory.overrun()
    assert not memory.overrun()
