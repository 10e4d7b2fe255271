"""The table of what kernels need, from a few of them, compiled."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_table_says_what_a_kernel_takes_and_what_it_moves(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(SCRIPTS / "kernel_table.py"), "--capabilities", "90", "--examples", "scale and sum"]
    command += ["--markdown", "--processes", "1", "--results", str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    stored = json.loads((tmp_path / "kernel_table.json").read_text(encoding="utf-8"))
    assert "triton" in stored["versions"]
    text = (tmp_path / "kernel_table.md").read_text(encoding="utf-8")
    rows = stored["kernels"]
    assert {row["kernel"] for row in rows} == {"linear._scale_and_sum"}
    for row in rows:
        assert row["needs"]["sm_90"]["registers"] > 0
        for launch in row["h100"]:
            # g and y are read, g' is written, in bf16
            out = {"q, o": 4096, "k, v": 1024, "gate, up": 14336, "down": 4096}[launch["layer"]]
            assert launch["ideal_bytes"] >= 3 * 2 * launch["tokens"] * out
            assert launch["predicted_us"] >= launch["ideal_bytes"] / 3.0e12 * 1e6 - 0.01
    lines = [line for line in text.splitlines() if line.startswith("| scale and sum")]
    assert len(lines) == len(rows)
    assert all(line in said for line in lines)


@pytest.mark.slow
def test_rows_of_all_layers_are_of_the_model_and_others_are_kept(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [
        sys.executable,
        str(SCRIPTS / "kernel_table.py"),
        "--capabilities",
        "90",
        "--processes",
        "1",
        "--results",
    ]
    for example in ["take sample"], ["check and norm of all", "--keep"]:
        subprocess.run([*command, tmp_path, "--examples", *example], check=True, capture_output=True, env=environment)
    text = (tmp_path / "kernel_table.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert sum(line.startswith('{"example": ') for line in text.splitlines()) == len(stored["kernels"])
    assert {row["example"] for row in stored["kernels"]} == {"take sample", "check and norm of all"}
    assert stored["kept"]["examples"] == ["take sample"]
    model = {(row["kernel"], row["rank"]): row for row in stored["kernels"] if row["example"] != "take sample"}
    for (kernel, rank), row in model.items():
        assert [launch["layer"] for launch in row["h100"]] == ["model"] * 2
        # 32 times q and o, k and v, gate, up and down; A and B in fp32, W0 in bf16
        weights = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
        factors = 32 * rank * 4 * (2 * 8192 + 2 * 5120 + 3 * 18432)
        for launch in row["h100"]:
            read = factors + (2 * weights if kernel == "grouped_norm._refresh_all" else 0)
            assert read < launch["ideal_bytes"] < 1.01 * read
            assert launch["predicted_us"] >= launch["ideal_bytes"] / 3.0e12 * 1e6 - 0.01
    kernels = {"grouped_norm._check_all", "grouped_norm._refresh_all"}
    assert set(model) == {(kernel, rank) for kernel in kernels for rank in (16, 64)}
