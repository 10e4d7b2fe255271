"""What is compiled and timed, and when: counted in another process with the compiler and the driver stubbed."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton

from dora_peft.ops.kernels import tuning
from dora_peft.ops.kernels.tuning import Choice, Tuner, cdiv, power_of_two, token_bucket

KEYS, CONFIGS = ["bucket"], [triton.Config({"ROWS": rows}) for rows in (16, 32, 64)]


@pytest.fixture(scope="module")
def counts():
    script = Path(__file__).parents[2] / "specialise_kernels.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("p", ["0.0", "0.1"])
def test_many_lengths_compile_each_kernel_once_a_configuration(counts, p):
    compiled = counts[f"compiled {p}"]
    assert compiled
    for name, count in compiled.items():
        assert count <= max(1, counts["configs"][name]), (name, count)


@pytest.mark.parametrize(
    ("p", "new"),
    [
        ("0.0", ["_scaled_sum", "_scale_and_sum"]),
        ("0.1", ["_dropped_product", "_add_low_rank", "_dropped_gradient"]),
    ],
)
def test_a_kernel_is_tuned_once_a_power_of_two_of_tokens(counts, p, new):
    assert counts["buckets"] == 9
    assert counts[f"trials {p}"] == counts["buckets"] * sum(counts["configs"][name] for name in new)


def test_numbers_of_64_bits_compile_once_more(counts):
    assert [counts[name] for name in ("32 bits", "64 bits", "64 bits more")] == [
        {"_take_sample": 1},
        {"_take_sample": 1},
        {},
    ]


class Launched:
    """A kernel out = 2 x whose launches are recorded, the second configuration of which is the fastest."""

    __name__, arg_names = "launched", ["x", "out", "bucket"]

    def __init__(self):
        self.outs = []

    def by_triton(self, grid, args, options):
        self.outs.append(args[1].data_ptr())
        return options["ROWS"]


@pytest.fixture
def tuner(monkeypatch):
    tuner = Tuner(CONFIGS, KEYS, ["out"])
    disk = {}
    monkeypatch.setattr(tuner, "_read", lambda kernel, key: disk.get(key))
    monkeypatch.setattr(tuner, "_write", lambda kernel, key, config: disk.update({key: config}))
    monkeypatch.setattr(tuning, "gpu", lambda index: "one")
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    monkeypatch.setattr(tuning, "shared_memory_kib", lambda: 99)
    monkeypatch.setattr(tuning, "median_ms", lambda run: abs(run() - 32))
    return tuner


def test_trials_write_elsewhere_than_the_launch(tuner):
    kernel, x = Launched(), torch.zeros(4, 8)
    assert tuner.choose(kernel, 0, (1,), (x, x, 16), {}) == (CONFIGS[1], True)
    assert len(kernel.outs) == len(CONFIGS)
    assert x.data_ptr() not in kernel.outs


def test_what_was_found_is_not_tried_again(tuner):
    kernel, x = Launched(), torch.zeros(4, 8)
    for _ in range(2):
        tuner.choose(kernel, 0, (1,), (x, x, 16), {})
        # another process
        tuner.chosen.clear()
    assert len(kernel.outs) == len(CONFIGS)
    tuner.choose(kernel, 0, (1,), (x, x, 32), {})
    assert len(kernel.outs) == 2 * len(CONFIGS)


def test_nothing_is_timed_while_a_graph_is_captured(tuner, monkeypatch):
    kernel, x = Launched(), torch.zeros(4, 8)
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert tuner.choose(kernel, 0, (1,), (x, x, 16), {}) == (CONFIGS[0], False)
    assert not kernel.outs
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    assert tuner.choose(kernel, 0, (1,), (x, x, 16), {}) == (CONFIGS[1], True)
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert tuner.choose(kernel, 0, (1,), (x, x, 16), {}) == (CONFIGS[1], True)


def test_a_configuration_that_does_not_fit_is_left_out(tuner, monkeypatch):
    def fits(run):
        found = run()
        if found != 64:
            raise triton.runtime.errors.OutOfResources(1, 2, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "median_ms", fits)
    x = torch.zeros(4, 8)
    assert tuner.choose(Launched(), 0, (1,), (x, x, 16), {})[0] is CONFIGS[2]
    tuner.configs = CONFIGS[:2]
    with pytest.raises(triton.runtime.errors.OutOfResources):
        tuner.choose(Launched(), 0, (1,), (x, x, 32), {})


def test_what_needs_more_shared_memory_than_there_is_is_not_tried(tuner, monkeypatch):
    tuner.configs = [
        Choice({"ROWS": rows}, num_warps=4, num_stages=2, shared_kib=kib) for rows, kib in ((64, 99), (32, 192))
    ]
    x = torch.zeros(4, 8)
    assert tuner.choose(Launched(), 0, (1,), (x, x, 16), {})[0] is tuner.configs[0]
    monkeypatch.setattr(tuning, "shared_memory_kib", lambda: 227)
    assert tuner.choose(Launched(), 0, (1,), (x, x, 32), {})[0] is tuner.configs[1]


@pytest.mark.parametrize("number", [1, 2, 15, 16, 17, 1000, 2**20, 2**20 + 1])
def test_whole_numbers(number):
    assert power_of_two(number) == triton.next_power_of_2(number)
    assert cdiv(number, 16) == triton.cdiv(number, 16)
    assert token_bucket(number) == max(16, triton.next_power_of_2(number))
