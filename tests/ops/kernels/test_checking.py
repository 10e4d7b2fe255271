"""How the kernels are checked: what is found and named, in every configuration, without a trace."""

import platform
import random

import numpy as np
import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from checking_fixtures import HERE, Nothing, only, run
from kernel_fixtures import DEVICE

from dora_peft.ops.kernels import checking, linear, sample, selfcheck
from dora_peft.ops.kernels.checking import KernelMismatch
from dora_peft.ops.kernels.guarded import Guarded
from dora_peft.ops.kernels.launch import Kernel
from dora_peft.ops.kernels.tuning import Tuner


@pytest.mark.parametrize("place", [-1, checking.TOKENS * checking.WIDTH, checking.TOKENS * checking.WIDTH + 999])
def test_a_number_written_beside_the_output_is_found(place, monkeypatch):
    right = linear.scaled_sum

    def wrong(*args, out, **kwargs):
        y = right(*args, out=out, **kwargs)
        y.as_strided((1,), (1,), y.storage_offset() + place).fill_(0)
        return y

    only(monkeypatch, selfcheck.scaled_sum)
    run()
    monkeypatch.setattr(linear, "scaled_sum", wrong)
    with pytest.raises(KernelMismatch, match="kernel scaled_sum in float32 found something written beyond the end"):
        run()


def test_a_number_read_beside_an_input_is_found(monkeypatch):
    right = linear.scaled_sum

    def wrong(z, u, *args, out, **kwargs):
        beyond = u.as_strided(u.shape, u.stride(), u.storage_offset() + 1)
        return right(z, beyond, *args, out=out, **kwargs)

    only(monkeypatch, selfcheck.scaled_sum)
    monkeypatch.setattr(linear, "scaled_sum", wrong)
    with pytest.raises(KernelMismatch, match="y is off by nan"):
        run()


def test_another_shape_is_found(monkeypatch):
    right = sample.take_sample
    monkeypatch.setattr(sample, "take_sample", lambda *args, **into: tuple(part[:-1] for part in right(*args, **into)))
    with pytest.raises(KernelMismatch, match=r"the rows is of shape \(127,\), not \(128,\)"):
        run()


class Tuned(Kernel):
    """A kernel with several configurations, of which some are too large for the GPU or wrong."""

    def __init__(self, kernel, outcomes):
        super().__init__(kernel.fn, Tuner(outcomes, [], []))
        self.kernel, self.seen = kernel, []

    def launch(self, grid, *args, **constants):
        (outcome,) = self.tuner.configs
        self.seen.append(outcome)
        if outcome == "too large":
            raise checking.OutOfResources(200_000, 100_000, "shared memory")
        if outcome == "right":
            self.kernel[grid](*args, **constants)


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        (["right", "right"], None),
        (["right", "wrong"], KernelMismatch),
        (["too large", "right"], None),
        (["too large", "wrong"], KernelMismatch),
        (["too large", "too large"], checking.OutOfResources),
    ],
)
def test_every_configuration_that_fits_is_checked(outcomes, error, monkeypatch):
    kernel = Tuned(linear._scaled_sum_of_few_ranks, outcomes)
    monkeypatch.setattr(linear, "_scaled_sum_of_few_ranks", kernel)
    monkeypatch.setattr(checking, "_CHECKS", [(selfcheck.scaled_sum, [kernel])])
    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert list(dict.fromkeys(kernel.seen)) == list(dict.fromkeys(outcomes))
    assert kernel.tuner.configs == outcomes


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_configuration_that_is_forced_is_remembered_by_nobody(number):
    kernel = Tuned(linear._scaled_sum_of_few_ranks, ["first", "last"])
    tuner, known = kernel.tuner, kernel._known
    known["launched before"] = None
    with kernel.configured(number):
        assert kernel.tuner.configs == [["first", "last"][min(number, 1)]]
        assert kernel._known == {}
        kernel._known["launched now"] = None
    assert kernel.tuner is tuner
    assert tuner.configs == ["first", "last"]
    assert kernel._known is known
    assert list(known) == ["launched before"]


def test_it_leaves_everything_as_it_was():
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16), torch.device("meta"):
            run(torch.bfloat16)
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled(DEVICE)
            assert torch.empty(1).device.type == "meta"
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() is torch.float64
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_it_leaves_everything_as_it_was_when_it_fails(monkeypatch):
    monkeypatch.setattr(linear, "_scaled_sum_of_few_ranks", Nothing())
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(KernelMismatch):
            run()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_grad_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_check_that_fails_hides_no_other(monkeypatch):
    monkeypatch.setattr(linear, "_scaled_sum_of_few_ranks", Nothing())
    entries = [entry for entry in checking._CHECKS if entry[0] in (selfcheck.scaled_sum, selfcheck.samples)]
    monkeypatch.setattr(checking, "_CHECKS", entries)
    found = dict(checking.run_each(HERE, torch.float32))
    assert list(found) == ["scaled_sum", "samples"]
    assert isinstance(found["scaled_sum"], KernelMismatch)
    assert found["samples"] is None
    with pytest.raises(KernelMismatch, match="kernel scaled_sum"):
        run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_problems_four_bits_are_its_dense_weight(dtype):
    """Element by element, as the format says it."""
    stored, dense = checking.Problem(HERE, dtype, Guarded()).four_bit()
    packed, absmax, code = (part.tolist() for part in stored[:3])
    assert dense.shape == stored.shape == (checking.WIDTH, checking.WIDTH)
    for place in range(0, dense.numel(), 77):
        byte = packed[place // 2]
        value = code[byte & 15 if place % 2 else byte >> 4] * absmax[place // stored.blocksize]
        # the product, rounded to fp32, once more to the dtype
        assert dense.view(-1)[place] == torch.tensor(value, dtype=torch.float32).to(dtype).double()


def test_a_problem_lies_in_guarded_memory_and_leaves_the_random_numbers():
    before = torch.get_rng_state()

    def made():
        memory = Guarded()
        problem = checking.Problem(HERE, torch.bfloat16, memory)
        return memory, {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}

    memory, tensors = made()
    assert {name for name, tensor in tensors.items() if tensor.dtype is torch.float32} == {"A", "B", "c"}
    assert {"x", "g", "weight", "z", "y", "u", "du", "bias"} <= tensors.keys()
    assert not memory.overrun()
    for name in tensors:
        memory, tensors = made()
        tensor = tensors[name]
        tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel()).fill_(0)
        assert memory.overrun(), name
    assert torch.equal(torch.get_rng_state(), before)
