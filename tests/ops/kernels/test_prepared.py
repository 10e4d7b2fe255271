"""A prepared launch gives the driver what the first one gave, and steps aside where that would not hold."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from dora_peft.ops.kernels import launch
from dora_peft.ops.kernels.launch import Kernel
from dora_peft.ops.kernels.prepared import Prepared

ELSEWHERE, HERE = 0, 1


class Function:
    """Stands for Triton's kernel out = x at `place`, scaled; writes down what the driver is given."""

    __name__, arg_names = "function", ["x", "part", "out", "width", "place", "scaling", "BLOCK"]
    pre_run_hooks: tuple = ()
    compiles = True

    def __init__(self):
        self.params = [SimpleNamespace(name=n, do_not_specialize=n == "place") for n in self.arg_names]
        self.by_triton, self.directly = [], []

    def run(self, *args, grid, warmup, **options):
        self.by_triton.append(args)
        compiled = SimpleNamespace(run=lambda *given: self.directly.append(given), function="f", packed_metadata="m")
        return compiled if self.compiles else None


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs, of which the second is current; memory is the CPU's."""
    machine = SimpleNamespace(current=HERE, watched=None)
    monkeypatch.setattr(launch, "device_of", lambda _: HERE)
    monkeypatch.setattr(launch, "current_device", lambda: machine.current)
    monkeypatch.setattr(launch, "current_stream", lambda index: 100 + index)
    monkeypatch.setattr(launch, "hooks", machine)
    machine.launch_enter_hook = None

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, machine.current = machine.current, self.index

        def __exit__(self, *_):
            machine.current = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    return machine


def tensors():
    """x [4, 8], whose last rows are the part, and out."""
    return torch.zeros(4, 8), torch.zeros(4, 8)


@pytest.fixture
def prepared(machine):
    """A kernel, a launcher of it and its prepared launch, which has been called once."""
    function = Function()
    kernel, calls = Kernel(function), []

    def launcher(x, out, place, scaling):
        calls.append(place)
        kernel[(3, 2)](x, x[2:], out, 8, place, scaling, BLOCK=16)

    one = Prepared(launcher, {2: "place", 3: "scaling"})
    one.call(*tensors(), 5, 0.5)
    assert (len(function.by_triton), calls) == (1, [5])
    return SimpleNamespace(one=one, kernel=kernel, function=function, calls=calls, launcher=launcher)


def test_the_driver_is_given_what_a_launch_gives_it(prepared):
    x, out = tensors()
    prepared.launcher(x, out, 7, 0.25)
    prepared.calls.clear()
    prepared.one.call(x, out, 7, 0.25)
    usual, direct = prepared.function.directly
    assert usual == direct
    assert direct[:3] == (3, 2, 1)
    assert direct[9:] == (x.data_ptr(), x.data_ptr() + 64, out.data_ptr(), 8, 7, 0.25, 16)
    assert not prepared.calls


def misaligned():
    return torch.zeros(40)[1:33].view(4, 8)


@pytest.mark.parametrize("what", ["memory", "number", "device", "forgotten", "configured", "profiler", "hook"])
def test_it_steps_aside(prepared, machine, what):
    """Through the launcher, which finds out what the arguments are, and on the tensors' device."""
    x, out = tensors()
    prepared.calls.clear()
    place = 2**31 if what == "number" else 6
    if what == "memory":
        x = misaligned()
    if what == "device":
        machine.current = ELSEWHERE
    if what == "forgotten":
        prepared.kernel._known = {}
    if what == "profiler":
        machine.launch_enter_hook = SimpleNamespace(calls=[print])
    if what == "hook":
        prepared.function.pre_run_hooks = (print,)
    if what == "configured":
        with prepared.kernel.configured(0) if prepared.kernel.configs else forgotten(prepared.kernel):
            prepared.one.call(x, out, place, 0.5)
    else:
        prepared.one.call(x, out, place, 0.5)
    assert prepared.calls == [place]
    assert machine.current == (ELSEWHERE if what == "device" else HERE)
    # and comes back
    machine.current, machine.launch_enter_hook, prepared.function.pre_run_hooks = HERE, None, ()
    if what != "forgotten":
        prepared.one.call(*tensors(), 6, 0.5)
        assert prepared.calls == [place]


def forgotten(kernel):
    """What `configured` does to what is known."""
    kernel.configs = [None]
    return kernel.configured(0)


def test_the_launch_on_another_device_is_entered(prepared, machine):
    machine.current = ELSEWHERE
    prepared.one.call(*tensors(), 6, 0.5)
    # the stream of the tensors' device
    assert prepared.function.directly[-1][3] == 100 + HERE


def test_nothing_is_prepared_where_nothing_is_compiled(prepared):
    prepared.function.compiles, prepared.kernel._known = False, {}
    one = Prepared(prepared.launcher, {2: "place", 3: "scaling"})
    prepared.calls.clear()
    for place in (1, 2):
        one.call(*tensors(), place, 0.5)
    assert prepared.calls == [1, 2]


def test_a_part_of_unknown_memory_is_not_prepared(prepared):
    """Another tensor than those of the call: its address would be that of the first call for ever."""
    other = torch.zeros(4, 8)
    one = Prepared(lambda x, out: prepared.kernel[(1,)](x, other, out, 8, 1, 0.5, BLOCK=16))
    for _ in range(3):
        one.call(*tensors())
    assert one.call == one._first


def test_a_number_that_is_compiled_for_its_value_cannot_vary(prepared):
    one = Prepared(lambda x, width: prepared.kernel[(1,)](x, x, x, width, 1, 0.5, BLOCK=16), {1: "width"})
    with pytest.raises(TypeError, match="function is compiled for some values"):
        one.call(torch.zeros(4, 8), 8)


def test_what_layers_prepare_gives_the_driver_what_launchers_give():
    """Not in the interpreter, which launches nothing: with a stubbed driver and compiler, in another process."""
    program = Path(__file__).resolve().parents[2] / "prepared_launches.py"
    done = subprocess.run([sys.executable, "-W", "ignore", program, "8"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["prepared"] > 500
