"""The README's tables: of the benchmark, of the GPU, and how they are put in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import update_readme
from gpu.stages import Places, build_stages

CPU = torch.device("cpu")


@pytest.mark.cached_norms
def test_readme_table(measure: Callable[..., dict[str, Any]]) -> None:
    flags = ["--contenders", "dora,frozen,lora_floor"]
    memory = measure("memory", *flags, "--no-peak", "--checkpointing", "none")
    reports = [memory, measure("step", *flags), measure("refresh", "--shapes", "8x12")]
    lines = update_readme.benchmark_table(reports).splitlines()
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
    assert update_readme.benchmark_table([]) == ""


def test_readme_table_sets_compiled_against_compiled() -> None:
    result = {
        "quantity": "time_ms",
        "setting": {"rank": 16, "batch": 1, "seq_len": 8, "dtype": "fp32"},
        "contenders": {"lora": {"values": [4]}, "lora_compiled": {"values": [2]}, "dora_compiled": {"values": [3]}},
    }
    report = {"options": {"suite": "eval", "model": "tiny", "layers": 1}, "results": [result]}
    lines = update_readme.claim_lines(report, "eval", "time_ms", "evaluation", " ms")
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
