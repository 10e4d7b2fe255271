"""The check of the kernels: every kernel has one, it passes, it sees each fault, and leaves no trace."""

import ast
import importlib
import pkgutil
import platform
import random

import numpy as np
import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from kernel_fixtures import DEVICE, DTYPES

from dora_peft.ops import kernels
from dora_peft.ops.kernels import checking, linear, sample, selfcheck
from dora_peft.ops.kernels.checking import KernelMismatch
from dora_peft.ops.kernels.launch import Kernel
from dora_peft.ops.kernels.tuning import Tuner

HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
MODULES = {
    info.name: importlib.import_module(f"{kernels.__name__}.{info.name}")
    for info in pkgutil.iter_modules(kernels.__path__)
}


def kernels_in(module):
    """The names of a module's own kernels."""
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, Kernel) and value.fn.fn.__module__ == module.__name__
    }


def launchers_in(source: str, names: set[str]) -> dict[str, str]:
    """The public functions and methods that launch kernels of these names, each with one of them."""
    tree = ast.parse(source)
    owners = {f: f"{node.name}." for node in tree.body if isinstance(node, ast.ClassDef) for f in node.body}
    return {
        owners.get(f, "") + f.name: node.value.id
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")
        for node in ast.walk(f)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in names
    }


def source_of(module):
    with open(module.__file__, encoding="utf-8") as file:
        return file.read()


KERNELS = [(name, kernel) for name, module in MODULES.items() for kernel in sorted(kernels_in(module))]
LAUNCHERS = [
    (name, f, kernel)
    for name, module in MODULES.items()
    for f, kernel in launchers_in(source_of(module), kernels_in(module)).items()
]


def run(dtype=torch.float32):
    selfcheck.run(HERE, dtype)


def unchecked(found):
    return [f"{m}.{k}" for m, k in found if not any(getattr(MODULES[m], k) is c for c in checking.checked_kernels())]


def test_the_walk_finds_kernels_and_their_launchers():
    assert len(KERNELS) >= 14
    assert {("linear", "_scaled_sum_of_few_ranks"), ("grouped_norm", "_refresh_all")} <= set(KERNELS)
    # functions that kernels call
    assert not {("linear", "_transposed_product"), ("norm_rows", "norm_of_rows")} & set(KERNELS)
    assert ("norm", "row_norms", "_norm") in LAUNCHERS
    source = "def new(): _new[(1,)]()\nclass Group:\n    def check(self): _new[(1,)]()\n    def other(self): _old[0]"
    assert launchers_in(source, {"_new"}) == {"new": "_new", "Group.check": "_new"}


def test_every_kernel_has_a_check():
    assert unchecked(KERNELS) == [], "add a function with @checks(kernel) to dora_peft/ops/kernels/selfcheck.py"
    assert unchecked([("elements", "dot")]) == ["elements.dot"]
    # one that Triton's own call launches would be on the wrong device, see launch.py
    assert all(isinstance(kernel, Kernel) for kernel in checking.checked_kernels())


@pytest.mark.parametrize("dtype", [x for x, factors in DTYPES if x == factors])
def test_the_kernels_pass(dtype):
    run(dtype)


def only(monkeypatch, check):
    """Run no other check."""
    monkeypatch.setattr(checking, "_CHECKS", [entry for entry in checking._CHECKS if entry[0] is check])


def check_of(module, kernel):
    """What checks a kernel."""
    (check,) = (check for check, kernels in checking._CHECKS if getattr(MODULES[module], kernel) in kernels)
    return check


class Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.mark.parametrize(("module", "kernel"), KERNELS)
def test_a_kernel_that_does_nothing_is_found(module, kernel, monkeypatch):
    only(monkeypatch, check_of(module, kernel))
    monkeypatch.setattr(MODULES[module], kernel, Nothing())
    # fp32 is not for this one
    dtype = torch.bfloat16 if kernel == "_scaled_sum_of_many_ranks" else torch.float32
    with pytest.raises(KernelMismatch, match=r"check of kernel \w+ in \w+ found that .* is off by"):
        run(dtype)


@pytest.mark.parametrize(("module", "launcher", "kernel"), LAUNCHERS)
def test_a_wrong_number_is_found_and_named(module, launcher, kernel, monkeypatch):
    only(monkeypatch, check_of(module, kernel))
    *names, name = launcher.split(".")
    owner = getattr(MODULES[module], names[0]) if names else MODULES[module]
    right = getattr(owner, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        tensor = result[0] if isinstance(result, tuple) else result
        tensor.view(-1)[tensor.numel() // 2] += 1
        return result

    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(KernelMismatch, match=r"in float32 found that .* is off by"):
        run()


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
