"""The price of a training step: its settings, one run at toy size, and what is not measured again."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import benchmark_price
from benchmarks import price
from benchmarks.libraries import LIBRARIES
from benchmarks.price import COMPILED, DRAWN, SEED, SETTINGS, draw_settings, ratio

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Measure the toy with the processes of a run in this one, and return what is stored."""
    started: list[list[str]] = []

    def run_in_this_process(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        benchmark_price.main(command[command.index(benchmark_price.__file__) + 1 :])
        return subprocess.CompletedProcess(command, 0)

    stub = SimpleNamespace(run=run_in_this_process, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(benchmark_price, "subprocess", stub)

    def call(*words: str) -> dict[str, Any]:
        started.clear()
        words = ("--settings=toy", "--rounds=1", "--warmup=1", f"--results={tmp_path}", *words)
        benchmark_price.main(words)
        return json.loads((tmp_path / "price_cpu.json").read_text()) | {"started": len(started)}

    return call


def test_a_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    linear, enabled = F.linear, torch.backends.mkldnn.enabled
    found = run("--processes=1")
    assert (F.linear, torch.backends.mkldnn.enabled) == (linear, enabled)
    entry = found["settings"]["toy"]
    assert found["seed"] == SEED
    assert entry["setting"]["shape"]["hidden"] == SETTINGS["toy"].shape.hidden
    assert {"instruction_sets", "versions", "commit"} <= entry["machine"].keys()
    (process,) = entry["found"]
    assert list(process) == list(LIBRARIES)
    for choice, measured in process.items():
        # ours was compared with PEFT's DoRA
        assert measured["checked"]["dora"]["against"] == "peft_dora"
        # of one round the median ratio is that of the medians
        expected = measured["ms"]["dora"] / measured["ms"]["lora"]
        assert measured["ratio"] == {"ours / LoRA": pytest.approx(expected)}
        assert entry["prices"][choice]["ours / LoRA"]["median"] == measured["ratio"]["ours / LoRA"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| toy |"))
    assert row.count("|") == 7
    assert f"{entry['prices']['torch']['ours / LoRA']['median']:.3f}" in row


def test_each_library_multiplies_in_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    train = price.train

    def watched(*arguments: Any) -> Any:
        routed = F.linear is not linear
        seen.add((torch.backends.mkldnn.enabled, routed))
        return train(*arguments)

    linear = F.linear
    monkeypatch.setattr(price, "train", watched)
    price.measure_setting("toy", 1, 1, 0)
    assert seen == {(True, False), (False, False), (True, True)}


def test_unequal_contenders_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = price.observe_gradients

    def disturbed(contender: Any, tokens: torch.Tensor) -> Any:
        found = observe(contender, tokens)
        return found | ({"loss": found["loss"] * 1.1} if contender.name == "dora" else {})

    monkeypatch.setattr(price, "observe_gradients", disturbed)
    monkeypatch.setattr(price, "train", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="dora: its loss differs from that of peft_dora"):
        price.measure_setting("toy", 1, 1, 0)


def test_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this commit has stored with these options is not repeated; and a changed tree is no commit."""
    machine = benchmark_price.describe_machine(torch.device("cpu")) | {"commit": "0" * 40, "modified": False}
    monkeypatch.setattr(benchmark_price, "describe_machine", lambda _: dict(machine))
    measured: list[str] = []

    def measure(name: str, *_: int) -> dict[str, Any]:
        measured.append(name)
        value = float(len(measured))
        return {"default": {"ms": {"lora": 1.0, "dora": value}, "ratio": {"ours / LoRA": value}, "checked": {}}}

    monkeypatch.setattr(benchmark_price, "measure_setting", measure)
    first = run("--processes=3")
    prices = first["settings"]["toy"]["prices"]["default"]["ours / LoRA"]
    assert prices == {"median": 2.0, "least": 1.0, "most": 3.0}
    again = run("--processes=3", "--resume")
    assert (again["started"], again["settings"]) == (0, first["settings"])
    assert run("--processes=2", "--resume")["started"] == 2
    machine["commit"] = "1" * 40
    # one that is not asked for stays
    other = run("--processes=1", "--resume", "--settings=short")["settings"]
    assert list(other) == ["short", "toy"]
    assert [other[name]["machine"]["commit"][0] for name in other] == ["1", "0"]
    assert run("--processes=2", "--resume")["started"] == 2
    machine["modified"] = True
    assert run("--processes=2", "--resume")["started"] == 2


def test_the_drawn_shapes() -> None:
    """Within what the table says of them, always the same, and not alike."""
    drawn = draw_settings(SEED, DRAWN)
    assert drawn == draw_settings(SEED, DRAWN) == [SETTINGS[f"drawn-{number}"] for number in range(1, DRAWN + 1)]
    assert drawn != draw_settings(SEED + 1, DRAWN)
    assert len({(one.shape, one.batch, one.seq_len) for one in drawn}) == DRAWN
    for one in [*drawn, *draw_settings(0, 300)]:
        shape = one.shape
        assert 128 <= one.batch * one.seq_len <= 600
        assert 400 <= shape.hidden <= 1600
        assert shape.head_dim is not None
        assert shape.heads * shape.head_dim == shape.hidden
        assert shape.head_dim % 2 == shape.heads % shape.kv_heads == 0
        assert 2 <= shape.intermediate / shape.hidden <= 3.5
        assert one.layers == (1 if shape.hidden > 1000 else 2)
        assert (one.rank in (8, 16, 32, 64), one.dropout in (0, 0.05, 0.1)) == (True, True)


def test_what_is_compiled_is_compared_with_both() -> None:
    compiled = SETTINGS["compiled"]
    assert compiled.prices == COMPILED
    assert {name for pair in COMPILED.values() for name in pair} <= set(compiled.contenders())
    assert "same" not in compiled.libraries


def test_a_ratio_is_taken_within_each_round() -> None:
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_an_unknown_setting_is_refused(refused: Callable[[str], Any]) -> None:
    with refused("unknown settings nothing, expected some of llama-512,"):
        benchmark_price.main(["--settings", "toy,nothing"])
