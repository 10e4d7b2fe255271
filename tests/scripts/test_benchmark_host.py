"""The benchmark of the host's time runs without a GPU, with and without another package's path."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("other", [[], ["--package", str(ROOT), "--commit", "one"]], ids=["this", "other"])
def test_it_measures_every_contender(other, tmp_path):
    command = [sys.executable, "scripts/benchmark_host.py", "--rounds", "1", "--steps", "1", "--results", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, *other], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "host_cpu.json").read_text())
    assert len(stored["host_us"]) == 4
    for times in stored["host_us"].values():
        assert len(times) == 7
        assert all(us > 0 for us in times.values())
    assert (stored["commit"] == "one") == bool(other)
