"""scripts/trace_calls.py: what it counts, and another checkout in a separate process."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dora_peft
import trace_calls
from trace_calls import Call, counts, functions, record, verdict


def test_a_call_counts_once_and_crosses_between_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traced_near.py").write_text(
        "import traced_far\ndef first(): return second() + traced_far.third()\ndef second(): return 1\n"
    )
    # json stands between the two functions of this file: it is no caller inside the folder.
    (tmp_path / "traced_far.py").write_text(
        "import json\ndef third(): return len(json.dumps([{1}], default=fourth))\ndef fourth(x): return 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    calls, result = record(f"{tmp_path}/", importlib.import_module("traced_near").first)
    assert result == 4
    assert calls == [
        Call("traced_near.py", "first", None),
        Call("traced_near.py", "second", "traced_near.py"),
        Call("traced_far.py", "third", "traced_near.py"),
        Call("traced_far.py", "fourth", "traced_far.py"),
    ]


def test_counts_and_goals() -> None:
    found = counts([Call("a.py", "f", None), Call("a.py", "g", "a.py"), Call("b.py", "h", "a.py")])
    assert found == {"calls": 3, "files": 2, "crossings": 1}
    assert verdict(found, {"calls": 3, "crossings": 1}).endswith(": met")
    assert verdict(found, {"calls": 3, "files": 1}).endswith(": missed")
    assert verdict(found, {}) == ""


def test_kernels_are_no_long_functions(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "norm.py").write_text("def launch():\n" + "    pass\n" * 60)
    (tmp_path / "layer.py").write_text("class Layer:\n    def forward(self):\n" + "        pass\n" * 4)
    assert list(functions(tmp_path)) == [(5, "layer.py:forward")]


@pytest.mark.cached_norms
def test_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    trace_calls.main(["--output", str(path), "-v"])
    report = json.loads(path.read_text(encoding="utf-8"))
    passes = report["trace"]
    assert set(passes) == set(trace_calls.GOALS)
    for found in passes.values():
        assert found["calls"] == len(found["called"]) > 0
        assert 0 <= found["crossings"] < found["calls"]
    fresh, due = (passes[f"training, {name}"]["calls"] for name in ("fresh norm", "norm due"))
    assert fresh < due
    # The layer's own forward is the first call.
    assert passes["evaluation"]["called"][0].endswith(":forward")
    printed = capsys.readouterr().out
    assert "longest function: " in printed
    assert all(call in printed for call in passes["backward"]["called"])


def test_another_checkout_needs_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trace_calls.main(["--package", str(tmp_path)])
    assert "expected a checkout with the folder dora_peft" in capsys.readouterr().err
    shutil.copytree(Path(dora_peft.__file__).parent, tmp_path / "dora_peft")
    with pytest.raises(SystemExit):
        trace_calls.main(["--package", str(tmp_path)])
    assert "use a fresh process" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 7])
def test_a_time_is_taken_in_a_process_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command[command.index("--package") + 1] == str(tmp_path)
        assert "--time" in command
        return subprocess.CompletedProcess(command, status, "12.5\n")

    monkeypatch.setattr(subprocess, "run", run)
    if status == 0:
        assert trace_calls.time_in_process(tmp_path, rounds=1) == 12.5
    else:
        with pytest.raises(RuntimeError, match="ended with status 7"):
            trace_calls.time_in_process(tmp_path, rounds=1)


def test_times_are_compared_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def timed(checkout: Path, rounds: int) -> float:
        order.append(checkout.name)
        return {"old": 40.0, "new": 30.0}[checkout.name]

    monkeypatch.setattr(trace_calls, "time_in_process", timed)
    found = trace_calls.compare_times(Path("new"), Path("old"), processes=3, rounds=1)
    assert order == ["old", "new", "new", "old", "old", "new"]
    assert found["ratio"] == {"median": 0.75, "min": 0.75, "max": 0.75}
    assert trace_calls.time_layer(dora_peft, rounds=1) > 0


def test_profiling_ends_with_an_error() -> None:
    def fail() -> None:
        raise ValueError("planned")

    before = sys.getprofile()
    with pytest.raises(ValueError, match="planned"):
        record("/nowhere/", fail)
    assert sys.getprofile() is before
