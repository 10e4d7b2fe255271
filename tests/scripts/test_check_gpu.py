"""scripts/check_gpu.py: what makes a check fail, and what a run that ended early leaves."""

import importlib
import json
import platform
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import check_gpu
import dora_peft
from dora_peft.ops import choice, selfcheck
from gpu import layer_checks, problem, registry
from gpu.registry import GROUPS, NAMES, Figures, run_check

if platform.system() == "Linux":
    from dora_peft.ops.kernels import checking, sample
    from dora_peft.ops.kernels import selfcheck as kernels_check

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
pytestmark = pytest.mark.cached_norms


def patch_check(monkeypatch: pytest.MonkeyPatch, function: Any) -> dict[str, Any]:
    monkeypatch.setattr(layer_checks, "layer_bf16", function)
    return run_check("layer_bf16", CPU, "torch")


def test_there_are_forty_with_their_functions() -> None:
    assert len(NAMES) == len(set(NAMES)) == 40
    for module, names in GROUPS.values():
        found = importlib.import_module(f"gpu.{module}")
        assert all(getattr(found, name).__module__ == found.__name__ for name in names)


@pytest.mark.parametrize("name", ["layer_bf16", "layer_bias_hides_output", "dropout_layer", "norm_that_cancels"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_checks_pass(name: str, implementation: str) -> None:
    result = run_check(name, CPU, implementation if name != "dropout_layer" else "triton")
    assert result["status"] == "passed", result
    assert len(result["figures"]) >= 6


@pytest.mark.parametrize("leaf", ["y", "x", "A", "B", "m"])
def test_one_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, leaf: str) -> None:
    run = problem.Problem.run

    def off(self: Any, forward: Any = None) -> Any:
        y, gradients = run(self, forward)
        found = {"y": y, **gradients}
        found[leaf] = found[leaf] * 1.03
        return found.pop("y"), found

    monkeypatch.setattr(problem.Problem, "run", off)
    result = run_check("layer_bf16", CPU, "torch")
    assert (result["status"], result["reason"]) == ("failed", f"off: {'y' if leaf == 'y' else 'd' + leaf}")


def test_nan_is_the_worst() -> None:
    figures = Figures()
    for error in (0.1, float("nan"), 0.2):
        figures.add("y", error, 1.0)
    assert figures.wrong() == ["y"]


def test_warnings_of_this_package_alone_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(of: ModuleType) -> Any:
        def check(device: torch.device, figures: Figures) -> None:
            figures.require("something", True)
            warnings.warn_explicit("be careful", UserWarning, str(of.__file__), 1)

        return check

    assert patch_check(monkeypatch, warns(torch)) | {"seconds": 0} == {
        "name": "layer_bf16", "status": "passed", "reason": "", "seconds": 0, "figures": {"something": [0.0, 0.0]},
        "warnings_of_others": ["be careful"],
    }  # fmt: skip
    found = patch_check(monkeypatch, warns(importlib.import_module("dora_peft.ops.choice")))
    assert (found["status"], found["reason"]) == ("failed", "dora_peft warned: be careful")


def test_a_check_that_raises_or_compares_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(device: torch.device, figures: Figures) -> None:
        raise RuntimeError("no C compiler")

    found = patch_check(monkeypatch, raises)
    assert found["status"] == "failed"
    assert found["reason"].startswith("RuntimeError: no C compiler (test_check_gpu.py:")
    found = patch_check(monkeypatch, lambda device, figures: None)
    assert (found["status"], found["reason"]) == ("failed", "it compared nothing")


@pytest.fixture
def one_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its check finds it, as on a GPU whose kernels are interpreted; no other check launches it."""
    right = sample.take_sample

    def wrong(*args: Any, **into: Any) -> Any:
        rows, diagonal = right(*args, **into)
        # layers have it write into memory of their own
        return rows if into else rows + 1, diagonal

    monkeypatch.setattr(sample, "take_sample", wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    run = kernels_check.run
    monkeypatch.setattr(kernels_check, "run", lambda device, dtype: run(CPU, dtype))
    for name, empty in ("_known", {}), ("_warned", set()):
        monkeypatch.setattr(selfcheck, name, empty)
    monkeypatch.setattr(choice, "_answers", {})


@needs_triton
def test_a_kernel_that_fails_its_own_check_hides_no_other_check(one_wrong_kernel: None) -> None:
    with pytest.raises(RuntimeError, match="the rows is off by"):
        dora_peft.implementation("triton")
    result = run_check("layer_without_bias", CPU, "triton")
    assert result["status"] == "passed", result


@needs_triton
def test_a_kernel_that_fails_its_own_check_is_one_finding(
    one_wrong_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [entry for entry in checking._CHECKS if entry[0].__name__ in ("samples", "row_norms", "scale_and_sum")]
    monkeypatch.setattr(checking, "_CHECKS", checks)
    result = run_check("auto_takes_kernels", CPU, "triton")
    assert result["status"] == "failed"
    wrong = [label for label, (error, _) in result["figures"].items() if error]
    # each of three kernels in three dtypes
    assert len(result["figures"]) == 9
    assert [label.partition(" (")[0] for label in wrong] == [
        f"samples in {d}" for d in ("float32", "bfloat16", "float16")
    ]
    assert all("KernelMismatch: the check of kernel samples in" in label for label in wrong)
    assert result["reason"] == f"off: {', '.join(wrong)}"


def test_a_missing_package_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "bitsandbytes", None)
    found = run_check("four_bit_layer", CPU, "torch")
    assert found["status"] == "skipped"
    assert "bitsandbytes cannot be imported" in found["reason"]


def test_a_killed_run_is_remembered(tmp_path: Path) -> None:
    log = tmp_path / "checks.jsonl"
    for name, status in (("layer_bf16", "begun"), ("layer_bf16", "passed"), ("layer_fp32", "begun")):
        check_gpu.append(log, {"name": name, "status": status}, "key")
    check_gpu.append(log, {"name": "layer_fp16", "status": "passed"}, "other files")
    with log.open("a") as file:
        # half a line
        file.write(json.dumps({"name": "x"})[:5])
    found = check_gpu.read_log(log, "key")
    assert {name: entry["status"] for name, entry in found.items()} == {"layer_bf16": "passed", "layer_fp32": "begun"}


def test_names_are_chosen_by_their_beginnings() -> None:
    assert check_gpu.chosen(["norm_at", "two"]) == ["norm_at_creation", "two_devices"]
    assert check_gpu.chosen([]) == list(registry.NAMES)
    with pytest.raises(SystemExit, match="no check begins with 'nothing_such'"):
        check_gpu.chosen(["nothing_such"])
