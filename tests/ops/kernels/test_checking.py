"""How the kernels are checked: what is found and named, in every configuration, without a trace."""

import platform
import random

import numpy as np
import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from checking_fixtures import Nothing, only, run
from kernel_fixtures import DEVICE

from dora_peft.ops.kernels import checking, linear, sample, selfcheck
from dora_peft.ops.kernels.checking import KernelMismatch
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
