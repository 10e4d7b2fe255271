"""A GPU in a container without a C compiler: the model is made, and trains, by torch's operations."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
@pytest.mark.parametrize("forced", [False, True], ids=["usual", "forced"])
def test_a_container_without_a_compiler_takes_torchs_operations_and_says_why(tmp_path, forced):
    """Also where the kernels are to be tried on a GPU that nobody has tried."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "DORA_PEFT_KERNELS")}
    environment |= {
        "PATH": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": str(TESTS.parent),
        # neither a driver that was built before nor a memory of kernels that have passed
        "TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path),
        # the driver's library is not looked for: what comes next is building Triton's own part of it
        "TRITON_LIBCUDA_PATH": str(tmp_path),
    }  # fmt: skip
    if forced:
        environment["DORA_PEFT_KERNELS"] = "1"
    command = [sys.executable, str(TESTS / "no_compiler.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    (warning,) = found["warnings"]
    assert warning.startswith("dora_peft computes by torch's operations on cuda:0 (A GPU), not by its own kernels: ")
    assert "RuntimeError: Failed to find C compiler" in warning
    # of a model with two layers, and two passes
    assert "auto" in found["asked"]
    assert found["off"] < 1e-5
    assert {name.split(".")[-3] for name in found["trained"]} == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert len(found["trained"]) == 6
    assert "implementation('triton') is not available: RuntimeError: Failed to find C compiler" in found["error"]
