"""The suites about what many adapters cost, and about the memory that operations leave behind, at toy size."""

import itertools
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from benchmark_fixtures import SMALL
from torch.nn import Linear

import benchmark
from benchmarks import footprint, resident
from benchmarks.bases import SHAPES, build_at_once
from benchmarks.contenders import IDLE
from benchmarks.options import read_options


def test_idle(measure: Callable[..., dict[str, Any]]) -> None:
    report = measure("idle", "--layers", "1")
    assert [list(result["contenders"]) for result in report["results"]] == [
        ["lora", "lora_idle"],
        ["dora", "dora_idle"],
    ]
    for result in report["results"]:
        assert result["setting"]["idle"] == IDLE
        assert result["contenders"][result["reference"]]["ratio"] == 1
        # both were compared
        assert result["checked"][f"{result['reference']}_idle"]["error"] < 1e-4


def test_resident(measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_in_this_process(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        benchmark.main(command[command.index(benchmark.__file__) + 1 :])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(footprint, "subprocess", SimpleNamespace(run=run_in_this_process, DEVNULL=subprocess.DEVNULL))
    # so that each operation adds one
    monkeypatch.setattr(resident, "anonymous_mib", map(float, itertools.count()).__next__)
    report = measure("resident", "--dtype", "bf16", "--repeats", "2")
    assert len(asked) == 6
    assert [result["setting"]["operation"] for result in report["results"]] == list(resident.OPERATIONS)
    for result in report["results"]:
        assert list(result["contenders"]) == ["lora", "peft_dora", "dora"]
        assert all(found["values"] == [1.0, 1.0] for found in result["contenders"].values())


def test_resident_is_about_a_cpu() -> None:
    options = read_options(["resident", *SMALL])
    options.device = torch.device("cuda")
    with pytest.raises(ValueError, match="--device cuda"):
        list(resident.run_resident(options, {}))


def test_the_real_vocabulary_is_kept() -> None:
    assert read_options(["resident", "--model", "llama-3.2-1b", "--device", "cpu"]).vocab == 128256


def test_only_memory_that_is_no_files_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    used = SimpleNamespace(rss=7 * 2**20, shared=3 * 2**20)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))
    assert resident.anonymous_mib() == 4


def test_a_model_built_at_once_computes() -> None:
    model = build_at_once(SHAPES["tiny"], 2, 128, torch.bfloat16, 0)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(isinstance(module, Linear) for module in model.modules()) == 15
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_tied_weights_stay_tied() -> None:
    shape = SHAPES["smollm2-135m"]
    model = build_at_once(shape, 1, 64, torch.float32, 0)
    assert shape.tied
    assert model.lm_head.weight is model.model.embed_tokens.weight
