"""The README's tables and the GPU's page: of the benchmark, of the GPU, and how they are put in."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import update_readme
from benchmarks import cpu_page
from gpu.stages import Places, build_stages

CPU = torch.device("cpu")


@pytest.mark.cached_norms
def test_readme_table(measure: Callable[..., dict[str, Any]]) -> None:
    flags = ["--contenders", "dora,frozen,lora_floor"]
    memory = measure("memory", *flags, "--no-peak", "--checkpointing", "none")
    reports = [memory, measure("step", *flags), measure("refresh", "--shapes", "8x12")]
    lines = cpu_page.benchmark_table(reports).splitlines()
    assert lines[2].startswith("| | PEFT LoRA | frozen base | LoRA floor | PEFT `use_dora` | dora_peft |")
    labels = [line.split("|")[1].strip() for line in lines[4:]]
    assert labels == [
        "training step: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens",
        "kept for backward: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens",
        "kept for backward: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens, bf16, adapter fp32",
        "kept for backward: tiny, 2 layers, r=16, dropout 0, 2 x 16 tokens, bf16",
        "norms per layer and optimizer step: tiny, 2 layers, r=16, 4 micro-batches, checkpointing",
    ]
    assert lines[-1].endswith("| 0 | - | - | 8 | 1 |")
    step = reports[1]["results"][0]["contenders"]
    assert lines[4].endswith(f" {step['peft_dora']['ratio']:.2f} | {step['dora']['ratio']:.2f} |")
    assert cpu_page.benchmark_table([]) == ""


def test_readme_table_sets_compiled_against_compiled() -> None:
    result = {
        "quantity": "time_ms",
        "setting": {"rank": 16, "batch": 1, "seq_len": 8, "dtype": "fp32"},
        "contenders": {"lora": {"values": [4]}, "lora_compiled": {"values": [2]}, "dora_compiled": {"values": [3]}},
    }
    report = {"options": {"suite": "eval", "model": "tiny", "layers": 1}, "results": [result]}
    lines = cpu_page.claim_lines(report, "eval", "time_ms", "evaluation", " ms")
    assert lines[0].endswith("| 4 ms | - | - | - | - |")
    assert lines[1] == "| evaluation, compiled: tiny, 1 layer, r=16, 1 x 8 tokens | 2 ms | - | - | - | 1.50 |"


def test_insert_leaves_the_rest_alone() -> None:
    text = "a\n<!-- table: x -->\nold\n<!-- end: x -->\nb\n"
    assert update_readme.insert(text, "x", "new") == text.replace("old", "new")
    assert update_readme.insert(text, "x", "") == text.replace("old\n", "")
    assert update_readme.insert(text, "y", "new") == text


def gpu_report(quantity: str, setting: dict[str, Any], **values: list[float]) -> dict[str, Any]:
    contenders = {name: {"values": found} for name, found in values.items()}
    result = {"quantity": quantity, "setting": setting, "contenders": contenders}
    return {"device": "Some GPU", "versions": {"torch": "1.2"}, "commit": "0123456789", "results": [result]}


def test_a_gpu_table_without_results_says_so() -> None:
    lines = update_readme.gpu_table({}).splitlines()[2:]
    assert len(lines) == len(update_readme.GPU_LINES)
    assert all(line.endswith("| not measured yet |") for line in lines)


def test_readme_has_one_line_of_gpus() -> None:
    lines = [update_readme.gpu_line({}), update_readme.gpu_line({"kernels_cuda": gpu_report("", {})})]
    assert all("\n" not in line and f"]({update_readme.GPU_PAGE})" in line for line in lines)
    assert "not measured yet" in lines[0]
    assert "not measured yet" not in lines[1]
    assert f": 1 of {len(update_readme.GPU_LINES)} figures on Some GPU (torch 1.2, commit 012345678) (" in lines[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a README that has the GPU's marks, and without results."""
    results = tmp_path / Path(update_readme.GPU_PAGE).parent
    results.mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- table: gpu -->\n<!-- end: gpu -->\n", encoding="utf-8")
    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    monkeypatch.setattr(update_readme, "RESULTS", results)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["update_readme.py", *words])
    return update_readme.main()


def test_the_gpu_page_is_written_and_linked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == 0
    link = re.search(r"\]\((.*?)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert link
    assert update_readme.gpu_table({}) in (folder / link[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("stale", ["README.md", update_readme.GPU_PAGE])
def test_check_names_what_is_out_of_date(
    folder: Path, stale: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    text = (folder / stale).read_text(encoding="utf-8").replace("not measured yet", "0.50", 1)
    (folder / stale).write_text(text, encoding="utf-8")
    assert run(monkeypatch, "--check") == 1
    assert capsys.readouterr().err.startswith(str(folder / stale))
    # and changes nothing
    assert (folder / stale).read_text(encoding="utf-8") == text


def test_check_misses_a_gpu_page_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == 0
    (folder / update_readme.GPU_PAGE).unlink()
    assert run(monkeypatch, "--check") == 1


def test_a_gpu_table_reads_what_was_measured() -> None:
    bf16 = {"checkpointing": "none", "dtype": "bf16", "adapter_dtype": "bf16"}
    table = update_readme.gpu_table(
        {
            "step_llama-3-8b_cuda_step_8b": gpu_report(
                "time_ms", bf16, lora=[2, 4, 8], dora=[1, 3, 6], peft_dora=[4, 8, 9]
            ),
            "memory_llama-3.2-3b_cuda_memory": gpu_report("peak_mib", bf16, lora=[100], dora=[109]),
            "step_qwen3-8b_cuda_qwen": gpu_report("time_ms", bf16, lora=[4000], dora=[5000], peft_dora=[13000]),
            "kernels_cuda": gpu_report("", {}) | {"gb_per_s": {"copy": 4000, "compose": 3600, "scale_and_sum": 3000}},
            "qdora_cuda": gpu_report("", {})
            | {"qdora": {n: {"time_ms": [t], "peak_mib": [p]} for n, t, p in [("qlora", 100, 50), ("qdora", 102, 51)]}},
        }
    )
    assert table.startswith("On Some GPU (torch 1.2, commit 012345678):")
    cells = [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[4:]]
    measured = [cell for cell in cells if cell != "not measured yet"]
    assert measured == ["0.75", "0.38", "5.00 s / 13.00 s", "1.09", "0.75", "1.02 and 1.02"]


def test_gpu_lines_are_of_stages(tmp_path: Path) -> None:
    """Each line's file is one that a stage of gpu.sh writes."""
    written = {name for stage in build_stages(Places("cuda", tmp_path, tmp_path, tmp_path)) for name in stage.results}
    for _, _, name, _ in update_readme.GPU_LINES:
        assert f"{name}.json" in written
