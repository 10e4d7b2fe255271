"""The checks of the kernels: every kernel has one, it passes, and sees a kernel that does nothing or errs."""

import ast
import importlib
import pkgutil
import platform

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from checking_fixtures import Nothing, only, run
from kernel_fixtures import DTYPES

from dora_peft.ops import kernels
from dora_peft.ops.kernels import checking
from dora_peft.ops.kernels.checking import KernelMismatch
from dora_peft.ops.kernels.launch import Kernel

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


def check_of(module, kernel):
    """What checks a kernel."""
    (check,) = (check for check, kernels in checking._CHECKS if getattr(MODULES[module], kernel) in kernels)
    return check


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
