"""Every kernel is launched on the device of its tensors, by one helper. Without a GPU: the driver is a stub."""

import ast
import importlib
import pkgutil
import platform
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kernel_fixtures import BF16, FP32, P, S
from torch._subclasses import FakeTensorMode

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton

import dora_peft
from dora_peft.ops import kernels
from dora_peft.ops.kernels import fused, grouped_norm, launch, norm
from dora_peft.ops.kernels.launch import Kernel
from dora_peft.ops.kernels.options import KernelOptions

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)
]
KERNELS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, Kernel) and value.fn.fn.__module__ == module.__name__
}
# the driver's current device in these tests, and its streams
ELSEWHERE, HERE = 0, 1
STREAMS = {ELSEWHERE: 1000, HERE: 2000}


class Driver:
    """Records the device and the stream of each launch, as Triton's and the compiled kernels' calls choose them."""

    def __init__(self):
        self.current, self.launches = ELSEWHERE, {}

    @contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def record(self, name, stream, road):
        self.launches.setdefault(name, []).append((self.current, stream, road))


class Stub:
    """Stands for Triton's kernel, which launches on the current device and gives what it compiled."""

    pre_run_hooks = ()
    function = packed_metadata = None

    def __init__(self, name, driver):
        self.name, self.driver = name, driver

    def by_triton(self, *_, grid, warmup, **__):
        self.driver.record(self.name, STREAMS[self.driver.current], "Triton")
        return self.compiled

    def directly(self, _, __, ___, stream, *____):
        self.driver.record(self.name, stream, "directly")


class Compiled:
    function = packed_metadata = None

    def __init__(self, stub):
        self.run = stub.directly


@pytest.fixture
def driver(monkeypatch):
    """A machine of two GPUs, whose tensors have no memory."""
    driver = Driver()
    monkeypatch.setattr(launch, "current_device", lambda: driver.current)
    monkeypatch.setattr(launch, "current_stream", STREAMS.__getitem__)
    monkeypatch.setattr(torch.cuda, "device", driver.device)
    monkeypatch.setattr(torch._subclasses.FakeTensor, "data_ptr", lambda _: 256, raising=False)
    monkeypatch.setattr(grouped_norm, "_processors", lambda _: 132)
    # torch's own indexing and copying ask the driver for the device
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, _: x)
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda x, part: torch.ops.aten.slice(x, 0, part.start, part.stop))
    for name, kernel in KERNELS.items():
        stub = Stub(name, driver)
        stub.compiled, stub.run = Compiled(stub), stub.by_triton
        monkeypatch.setattr(kernel, "fn", stub)
        monkeypatch.setattr(kernel, "_known", {})
    return driver


def run_everything(device):
    """Forward, backward and evaluation with and without dropout, both refreshes, and the sample of an output."""

    def empty(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device=device)

    x, weight, bias = empty(40, 64), empty(96, 64), empty(96)
    A, B, c = empty(8, 64, dtype=FP32), empty(96, 8, dtype=FP32), empty(96, dtype=FP32)
    for p, seed in ((0.0, None), (P, 2**40 + 1)):
        options = KernelOptions.of(S, p, seed, (True,) * 6)
        y, u = fused.forward(x, None, weight, bias, A, B, c, options)
        gone = fused.compare_sample(y, *fused.take_sample(y, 0, 0, 97, 96, 8), 0, 0, 97)
        fused.gradients(
            empty(40, 96), x, u, y, weight, bias, A, B, c, options, stored=weight, d_magnitude=None, gone=gone
        )  # fmt: skip
    fused.compose_folded(y, u, B, c, bias, in_place=True)
    fused.compose_folded(y, empty(40, 80), empty(96, 80), c, bias, in_place=True)
    norm.row_norms(weight, c, A, B, S)
    memory = norm.Memory(96, torch.device(device))
    norm.checked_norm(memory, weight, A, B, S, due=False, another=True)
    grouped_norm.Group([grouped_norm.Entry(memory, weight, A, B, S)]).check(0, False)


def run_twice(device):
    with FakeTensorMode():
        run_everything(device)
        run_everything(device)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_run_where_their_tensors_lie(driver, name):
    """On the second GPU while the first one is current: in Triton's own call, and directly the next time."""
    run_twice(f"cuda:{HERE}")
    assert driver.launches.keys() <= KERNELS.keys()
    assert {road for _, _, road in driver.launches[name]} == {"Triton", "directly"}
    assert {(device, stream) for device, stream, _ in driver.launches[name]} == {(HERE, STREAMS[HERE])}
    assert driver.current == ELSEWHERE


def test_the_current_device_is_not_entered_again(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", None)
    run_twice(f"cuda:{ELSEWHERE}")
    assert {launched[:2] for one in driver.launches.values() for launched in one} == {(ELSEWHERE, STREAMS[ELSEWHERE])}


def test_machine_code_of_one_device_is_not_launched_on_another(driver):
    run_twice(f"cuda:{ELSEWHERE}")
    driver.launches.clear()
    with FakeTensorMode():
        fused.take_sample(torch.empty(4, 8, device=f"cuda:{HERE}"), 0, 0, 9, 8, 2)
    assert driver.launches == {"sample._take_sample": [(HERE, STREAMS[HERE], "Triton")]}


def test_tensors_of_one_launch_lie_on_one_device(driver):
    with FakeTensorMode():
        y, rows, diagonal = (torch.empty(4, 8, device=device) for device in ("cuda:0", "cuda:0", "cuda:1"))
        with pytest.raises(
            ValueError, match=r"_compare_sample must lie on one device.*y on cuda:0.*diagonal on cuda:1"
        ):
            fused.compare_sample(y, rows, diagonal, 0, 0, 9)
    assert not driver.launches


def test_nothing_else_launches_a_kernel():
    """Whatever is called by `name[grid](...)` in the package is a `Kernel`, and so is each that no other calls."""
    package, launched = Path(dora_peft.__file__).parent, 0
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        name = ".".join(("dora_peft", *path.relative_to(package).with_suffix("").parts))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import) and path.parent.name != "kernels":
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(module.split(".")[0] == "triton" for module in modules), f"{path} imports Triton"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and path.parent.name == "kernels":
                found = eval(ast.unparse(node.func.value), vars(importlib.import_module(name)))
                if not isinstance(found, type) and found is not list:
                    assert isinstance(found, Kernel), f"{path}:{node.lineno}"
                    launched += 1
    assert launched >= len(KERNELS)
    functions = (triton.runtime.JITFunction, triton.runtime.interpreter.InterpretedFunction)
    for module in MODULES:
        source = Path(module.__file__).read_text()
        for name, value in vars(module).items():
            if isinstance(value, functions) and value.fn.__module__ == module.__name__:
                called_by_kernels = sum(
                    f" {name}(" in path.read_text() or f"({name}(" in path.read_text()
                    for path in Path(module.__file__).parent.glob("*.py")
                )
                assert called_by_kernels, f"{name} is launched by nobody, or not by a Kernel: {source[:50]}"
