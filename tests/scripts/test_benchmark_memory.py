"""The memory benchmark: what it counts, its table, and one whole run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetune_fixtures import make_config
from torch import nn

import benchmark_memory
from benchmark_memory import VARIANTS, check_losses, format_table, make_steps, record_saved_bytes
from finetune.options import build_parser

FLOAT = 4


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    with record_saved_bytes(model) as sizes:
        loss = model(x).sum()
    loss.backward()
    return sum(sizes.values())


def test_saved_bytes_leave_out_parameters() -> None:
    x = torch.randn(8, 3)
    assert saved_bytes(nn.Linear(3, 5), x) == 8 * 3 * FLOAT


def test_saved_bytes_count_a_storage_once() -> None:
    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # saves y
            y = x.exp()
            # both save views of y
            return y.view(-1).square() + y.view(-1).sin()

    assert saved_bytes(Shared(), torch.randn(8, 3, requires_grad=True)) == 8 * 3 * FLOAT


def test_saved_bytes_of_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2))
    # The input of the first layer and the output of the sigmoid, which is the input of the second.
    assert saved_bytes(model, torch.randn(8, 3)) == 8 * (3 + 5) * FLOAT


def test_steps_go_round_the_data(tmp_path: Path) -> None:
    path = make_config(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    _, _, args, _ = build_parser("").parse([str(path)])
    rows = [{"input_ids": [token], "labels": [token]} for token in range(3)]
    steps = make_steps(args, rows, 0, 2)
    assert [[batch["input_ids"].flatten().tolist() for batch in step] for step in steps] == [
        [[0, 1], [2, 0]],
        [[1, 2], [0, 1]],
    ]


def fake_result(first_loss: float, time_s: float) -> dict[str, float]:
    return {
        "trainable_parameters": 1000,
        "peak_mib": 10.0,
        "saved_mib": 4.0,
        "time_s": time_s,
        "tokens_per_s": 100.0,
        "first_loss": first_loss,
    }


def test_table_shows_ratios_to_lora() -> None:
    lines = format_table({"lora": fake_result(1.0, 0.5), "dora": fake_result(1.0, 0.75)}).splitlines()
    assert len(lines) == 3
    assert "0.750 (1.50x)" in lines[2]
    assert "1,000 (1.00x)" in lines[1]
    assert "x)" not in format_table({"dora": fake_result(1.0, 0.75)})


def test_methods_must_start_from_the_same_loss() -> None:
    check_losses({"lora": fake_result(1.0, 1.0), "dora": fake_result(1.005, 1.0)})
    with pytest.raises(RuntimeError, match=r"dora: expected the first loss 1.0000 of the others, found 1.1000"):
        check_losses({"lora": fake_result(1.0, 1.0), "dora": fake_result(1.1, 1.0)})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "lora,dorra"], "unknown method 'dorra'"),
        (["--steps", "0"], "at least 1"),
        (["--stepz", "1"], "unknown field 'stepz'"),
    ],
)
def test_wrong_options(tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark_memory.main([str(make_config(tmp_path)), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--packing"], ["--gradient_checkpointing", "--bf16"]])
def test_every_method_is_measured(tmp_path: Path, flags: list[str]) -> None:
    path = make_config(tmp_path)
    results = {}
    for name in VARIANTS:
        benchmark_memory.main([str(path), *flags, "--worker", name, "--steps", "2", "--json", str(tmp_path / "a.json")])
        results[name] = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    check_losses(results)
    for result in results.values():
        assert len(result["step_times_s"]) == 2
        assert result["last_loss"] < result["first_loss"]
        assert min(result[key] for key in ("saved_mib", "time_s", "tokens_per_s")) > 0
    sizes = {name: result["trainable_parameters"] for name, result in results.items()}
    assert sizes["lora"] < sizes["peft_dora"] == sizes["dora"] == sizes["dora_not_detached"]
    if not flags:
        assert results["lora"]["saved_mib"] < results["peft_dora"]["saved_mib"]


def test_one_whole_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in_this_process(command: list[str]) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, benchmark_memory.__file__]
        benchmark_memory.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark_memory, "subprocess", SimpleNamespace(run=run_in_this_process))
    figures, plot = tmp_path / "figures" / "a.json", tmp_path / "plots" / "a.png"
    flags = ["--steps", "2", "--methods", "lora,dora", "--json", str(figures), "--plot", str(plot), "--r", "3"]
    benchmark_memory.main([str(make_config(tmp_path)), *flags])
    out = capfd.readouterr().out
    assert "dora" in out.splitlines()[-4]
    assert "(1.00x)" in out
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert list(report["methods"]) == ["lora", "dora"]
    assert set(report["versions"]) == {"torch", "transformers", "peft", "dora_peft"}
    assert (report["steps"], report["config"]["r"]) == (2, 3)
    assert {"device", "threads", "commit", "python"} <= set(report)
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_failed_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_memory.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="lora: the benchmark's process ended with status 1"):
        benchmark_memory.main([str(make_config(tmp_path)), "--methods", "lora"])
