"""The benchmark: every suite at toy size, the check before timing, what counts as saved, resuming, and the table."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_fixtures import SMALL, found_names

import benchmark
from benchmarks import footprint as benchmark_footprint
from benchmarks import measure as benchmark_measure
from benchmarks import report
from benchmarks.options import DEFAULT, read_options, result_path

CPU = torch.device("cpu")
# Triton's interpreter takes longer than all others together.
UNINTERPRETED = ("--contenders", ",".join(name for name in DEFAULT if name != "dora:triton"))


def test_step(measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    report = measure("step", "--rank", "4,8", "--dropout", "0,0.05", "--accumulation", "2", *UNINTERPRETED)
    settings = [(r["setting"]["rank"], r["setting"]["dropout"]) for r in report["results"]]
    assert settings == [(4, 0.0), (4, 0.05), (8, 0.0), (8, 0.05)]
    for result in report["results"]:
        assert {"lora", "peft_dora", "dora", "dora:torch", "dora:reference", "frozen", "lora_floor"} <= set(
            result["contenders"]
        )
        assert result["contenders"]["lora"]["ratio"] == 1
        for found in result["contenders"].values():
            assert len(found["values"]) == 1
            assert found["values"][0] > 0
        # each contender was compared with those that it has to equal, also where dropout is timed
        assert set(result["checked"]) == set(result["contenders"]) - {"lora", "peft_dora"}
        assert all(0 <= c["error"] <= c["allowed"] for c in result["checked"].values())
    assert {"device", "processor", "threads", "python", "versions", "commit", "options"} <= set(report)
    assert report["options"]["rank"] == [4, 8]
    assert "dora:reference" in capsys.readouterr().out


def test_all_contenders_run_unless_some_are_asked_for(measure: Callable[..., dict[str, Any]]) -> None:
    assert found_names(measure("step", "--seq-len", "2", "--batch", "1", "--layers", "1")) == DEFAULT
    assert "peft_dora_cached" in read_options(["eval"]).contenders


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("flags", [[], ["--adapter-dtype", "bf16"]])
def test_step_in_bf16_with_checkpointing(measure: Callable[..., dict[str, Any]], flags: list[str]) -> None:
    kinds = "none,reentrant,non-reentrant"
    names = "dora,frozen,lora_floor"
    report = measure("step", "--dtype", "bf16", *flags, "--checkpointing", kinds, "--contenders", names)
    assert [r["setting"]["checkpointing"] for r in report["results"]] == kinds.split(",")
    assert found_names(report) == ["lora", "peft_dora", "dora", "frozen", "lora_floor"]


def test_layer(measure: Callable[..., dict[str, Any]]) -> None:
    report = measure("layer", "--shapes", "8x12,12x8", "--contenders", "dora,frozen,lora_floor", "--dropout", "0.1")
    settings = [(r["setting"]["shape"], r["setting"]["part"]) for r in report["results"]]
    assert settings == [(s, p) for s in ("8x12", "12x8") for p in ("forward", "backward", "both")]
    forward, backward, both = (r["contenders"]["dora"]["median"] for r in report["results"][:3])
    assert both == pytest.approx(forward + backward)
    assert set(report["results"][0]["checked"]) == {"dora", "frozen", "lora_floor"}


@pytest.mark.parametrize("suite", ["eval", "decode"])
def test_inference(measure: Callable[..., dict[str, Any]], suite: str) -> None:
    report = measure(suite, "--new-tokens", "3", "--contenders", "dora,frozen,lora_floor,peft_dora_cached")
    (result,) = report["results"]
    assert {"peft_dora_cached", "dora", "frozen", "lora_floor"} <= set(result["checked"])


@pytest.mark.cached_norms
def test_refresh(measure: Callable[..., dict[str, Any]]) -> None:
    report = measure("refresh", "--shapes", "16x24", "--dtype", "bf16")
    error, known, recomputed, counts = report["results"]
    assert error["contenders"]["dora"]["median"] < 1e-5 < 1e-4 < error["contenders"]["peft_dora"]["median"]
    assert known["quantity"] == recomputed["quantity"] == "refresh_ms"
    assert known["reference"] == "peft_dora"
    # a forward pass and its recomputation for each of four micro-batches, against one in all
    assert {n: c["median"] for n, c in counts["contenders"].items()} == {"lora": 0, "peft_dora": 8, "dora": 1}


def test_memory(measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_footprint, "peak_of_process", lambda name, options, setting: float(len(name)))
    report = measure("memory", "--contenders", "dora,frozen,lora_floor", "--repeats", "2")
    saved = [r for r in report["results"] if r["quantity"] == "saved_mib"]
    peaks = [r for r in report["results"] if r["quantity"] == "peak_mib"]
    assert [(r["setting"]["dtype"], r["setting"]["adapter_dtype"], r["setting"]["checkpointing"]) for r in saved] == [
        (*dtypes, checkpointing)
        for dtypes in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
        for checkpointing in ("none", "non-reentrant")
    ]
    assert [r["setting"]["checkpointing"] for r in peaks] == ["none", "non-reentrant"]
    assert peaks[0]["contenders"]["dora"]["values"] == [4.0, 4.0]
    for result in saved[::2]:
        figures = {name: found["median"] for name, found in result["contenders"].items()}
        assert 0 < figures["frozen"] < figures["lora_floor"] <= figures["lora"] < figures["peft_dora"]
    # what checkpointing keeps are the layers' inputs
    assert saved[1]["contenders"]["lora"]["median"] < saved[0]["contenders"]["lora"]["median"] / 4


def test_peak_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in_this_process(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        script = command.index(benchmark.__file__)
        benchmark.main(command[script + 1 :])
        return subprocess.CompletedProcess(command, 0)

    options = read_options(["memory", *SMALL])
    setting = {"rank": 4, "dropout": 0.1, "batch": 2, "seq_len": 16, "dtype": "fp32", "adapter_dtype": "fp32"}
    setting["checkpointing"] = "non-reentrant"
    with monkeypatch.context() as patch:
        patch.setattr(
            benchmark_footprint, "subprocess", SimpleNamespace(run=run_in_this_process, DEVNULL=subprocess.DEVNULL)
        )
        assert 0 <= benchmark_footprint.peak_of_process("dora", options, setting) < 500
    monkeypatch.setattr(benchmark_footprint.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="dora: the benchmark's process ended with status 1"):
        benchmark_footprint.peak_of_process("dora", options, setting)


def test_ratios_are_taken_within_a_round() -> None:
    values = {"lora": [1.0, 2.0, 4.0], "dora": [2.0, 2.0, 6.0]}
    found = benchmark_measure.summarize("time_ms", {}, values)["contenders"]["dora"]
    assert (found["q1"], found["median"], found["q3"]) == (2.0, 2.0, 4.0)
    assert (found["ratio_q1"], found["ratio"], found["ratio_q3"]) == (1.25, 1.5, 1.75)
    assert "ratio" not in benchmark_measure.summarize("time_ms", {}, {"dora": [1.0]})["contenders"]["dora"]


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or {"part": 0.001} for name in "abcd"}
    options = SimpleNamespace(seed=0, warmup=2, rounds=6)
    times = benchmark_measure.interleave(calls, options, "test")
    assert times == {"part": {name: [1.0] * 6 for name in "abcd"}}
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 8
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2


def test_all_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = benchmark.describe_machine(CPU) | {"commit": "0" * 40, "modified": False}
    monkeypatch.setattr(benchmark, "describe_machine", lambda device: machine)
    monkeypatch.setattr(benchmark, "PLAN", ("layer --shapes 8x12", "layer --shapes 8x12 --rank 2 --tag r2"))
    flags = ["all", *SMALL, "--contenders", "dora", "--results", str(tmp_path)]
    benchmark.main(flags)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(files) == {f"layer_8x12_cpu{tag}.{kind}" for tag in ("", "_r2") for kind in ("json", "png")}
    capsys.readouterr()
    benchmark.main(flags)
    assert capsys.readouterr().out.count("is there already") == 2
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    for changed in (["--force"], ["--seed", "1"]):
        benchmark.main([*flags, *changed])
        assert "is there already" not in capsys.readouterr().out
    machine["commit"] = "1" * 40
    benchmark.main([*flags, "--seed", "1"])
    assert "is there already" not in capsys.readouterr().out


def test_the_plan_is_valid() -> None:
    paths = [result_path(read_options(planned.split())) for planned in benchmark.PLAN]
    assert len(set(paths)) == len(paths) > 8
    assert all(path.parent == report.RESULTS for path in paths)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["step", "--contenders", "lora,dorra"], "unknown contender 'dorra'"),
        (["step", "--rounds", "0"], "at least 1"),
        (["step", "--dropout", "0,1"], "found '1'"),
        (["step", "--checkpointing", "some"], "unknown checkpointing 'some'"),
        (["step", "--adapter-dtype", "bf16"], "needs --dtype bf16"),
        (["layer", "--shapes", "12"], "INxOUT"),
        (["stepp"], "invalid choice: 'stepp'"),
    ],
)
def test_wrong_options(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert message in capsys.readouterr().err
