"""Every kernel, compiled for GPUs that are not here: the compiler refuses what the interpreter takes."""

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

from benchmarks import kernel_examples, kernel_work
from benchmarks.kernel_compiler import SHARED_LIMIT
from benchmarks.kernel_examples import Case, kernels_of, launches
from benchmarks.kernel_work import work
from dora_peft.ops.kernels import linear

TESTS = Path(__file__).parents[2]
STACK_LIMIT = 64


def compiled(words, cache):
    """What compile_kernels.py says, with a fresh cache, so that they have to be compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(TESTS / "compile_kernels.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        ["90"],
        # the least shared memory, and the most kinds of instructions
        *(pytest.param([str(capability), "all"], marks=pytest.mark.slow) for capability in SHARED_LIMIT),
    ],
    ids=" ".join,
)
def test_kernels_compile_and_fit(words, tmp_path):
    variants = compiled(words, tmp_path)
    assert {variant["kernel"] for variant in variants} == set(kernels_of())
    for variant in variants:
        assert variant["shared"] <= SHARED_LIMIT[variant["capability"]], variant
    measured = [variant for variant in variants if variant["rank"] <= 64]
    assert {variant["kernel"] for variant in measured} == set(kernels_of()) - {"linear._scaled_sum_of_many_ranks"}
    for variant in measured:
        # a few words lie there where that lets one more program run beside this one
        assert variant["stack"] <= STACK_LIMIT, variant
        # a gradient by columns has strides that a number of columns multiplies to more than 2^31; a norm's kernels
        # address A alone so, of rank x in elements
        assert len(variant["narrow"]) <= ("norm" in variant["kernel"]), variant


@pytest.mark.slow
def test_a_refresh_reads_w0_ahead_and_in_16_bytes(tmp_path):
    """Copied to shared memory where its rows are contiguous; else loaded in the loop and before it."""
    norms = [variant for variant in compiled(["80", "90", "norms"], tmp_path) if "digest" not in variant["kernel"]]
    refreshes = [variant for variant in norms if variant["kernel"] != "grouped_norm._check_all"]
    assert len(refreshes) == 2 * 3 * 5
    for variant in refreshes:
        rows = not variant["four_bit"] and not variant["by_columns"]
        # of 64 rows and as many columns, or half of those at higher ranks; A has no more rows than ranks
        blocks = {f"64x{64 if variant['rank'] <= 32 else 32}x{dtype}" for dtype in ("bf16", "f32")}
        dtype = {"torch.bfloat16": "bf16", "torch.float32": "f32"}[variant["dtype"]]
        copied = [block for block in variant["copied"] if block in blocks and block.endswith(dtype)]
        assert bool(copied) == rows, variant
        assert rows or variant["wide"] >= 2, variant
        assert variant["stack"] <= STACK_LIMIT, variant


def test_every_kernel_has_an_example():
    cases = [Case(tokens=256, out=64, features=64, rank=rank) for rank in (16, 384)]
    launched = {launch.name for case in cases for launch in launches(case)}
    missing = set(kernels_of()) - launched
    assert not missing, f"{missing}: add a call of their launcher to EXAMPLES in {kernel_examples.__file__}"
    assert {"linear._scale_and_sum", "dropout._add_low_rank", "sample._take_sample"} <= launched
    # functions that kernels call
    assert "dropout._kept" not in kernels_of()


def test_recording_leaves_the_kernels_in_their_modules():
    before = linear._scale_and_sum
    launches(Case(tokens=256, out=64, features=64))
    assert linear._scale_and_sum is before


@pytest.mark.parametrize("case", [Case(), Case(tokens=100, out=96, features=80, rank=20, dtype=torch.float32)])
def test_a_launch_moves_no_less_than_it_must(case):
    counted = set()
    for launch in launches(case):
        for config in launch.configs():
            done = work(launch, config)
            assert done is not None, f"{launch.name}: add a function to WORK in {kernel_work.__file__}"
            assert 0 < done.ideal <= done.asked
            assert launch.programs(config) >= 1
            counted.add(launch.function.__name__)
    # nothing is counted that no longer is
    assert counted == {*kernel_work.WORK, *kernel_work.WORK_OF_ALL}
