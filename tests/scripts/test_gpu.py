"""scripts/gpu.sh: the order of its stages, what stops them and what does not, and the archive that brings all home."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import run_gpu
from gpu import stages
from gpu.archive import NAME, cache_files, read_archive, tuning_files, write_archive
from gpu.runner import Runner
from gpu.stages import Part, Places, Stage, build_stages

SCRIPTS = Path(__file__).parents[2] / "scripts"
ORDER = ["versions", "checks", "warm", "kernels", "step_8b_default", "step_8b", "step_3b_default", "step_3b"]
ORDER += ["rank_384", "qwen", "qdora"]


def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", SCRIPTS / "gpu.sh", *words], capture_output=True, text=True, env=variables)


def places(folder: Path, device: str = "cuda") -> Places:
    found = Places(device, folder / "results", folder / "reproduce", folder / "work", folder / "data")
    for path in (found.results, found.reproduction):
        path.mkdir(parents=True, exist_ok=True)
    return found


def python(name: str, code: str, seconds: int = 0, limit: int = 60, **options: object) -> Stage:
    return Stage(name, seconds, limit, (Part(name, ("-c", code)),), **options)  # type: ignore[arg-type]


def runner(folder: Path, limit: float = 1000.0) -> Runner:
    return Runner(places(folder), folder / "out", limit)


def test_stages_are_listed_in_order() -> None:
    listed = [line.split()[0] for line in call("--list").stdout.splitlines()]
    assert listed[: len(ORDER)] == ORDER
    assert {"eval", "decode", "memory", "compiled", "reproduce_memory", "tests"} <= set(listed[len(ORDER) :])
    assert len(set(listed)) == len(listed)


def test_every_stage_fits_into_a_call(tmp_path: Path) -> None:
    for stage in build_stages(places(tmp_path)):
        assert stage.seconds < stage.limit <= run_gpu.LIMIT - 8, stage.name


def test_what_is_warmed_is_measured_later(tmp_path: Path) -> None:
    """The same options but for those that shrink the model, which come behind and so count."""
    found = {stage.name: stage for stage in build_stages(places(tmp_path))}
    for part in found["warm"].parts:
        words = found[part.name].parts[0].words
        assert (
            part.words[part.words.index("--dtype") :][: len(words) - words.index("--dtype")]
            == words[words.index("--dtype") :]
        )


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    result = call("unknown", RESULTS=str(tmp_path), GPU_WORK=str(tmp_path))
    assert result.returncode == 2
    assert "no stage 'unknown'; there are: versions checks warm kernels" in result.stderr


def test_without_a_gpu_nothing_is_measured_and_the_archive_says_so(tmp_path: Path) -> None:
    folders = {"RESULTS": tmp_path / "results", "GPU_WORK": tmp_path / "work", "GPU_OUT": tmp_path / "out"}
    result = call("kernels", CUDA_VISIBLE_DEVICES="", **{name: str(path) for name, path in folders.items()})
    assert result.returncode == 1
    assert "kernels: skipped, there is no GPU that torch can use" in result.stdout
    with tarfile.open(tmp_path / "out" / NAME) as found:
        manifest = json.load(found.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert {name: stage["status"] for name, stage in manifest["stages"].items()} == {
        "versions": "failed",
        "kernels": "skipped",
    }


def test_what_fails_or_lacks_a_package_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plan = [
        python("first", "raise SystemExit(3)"),
        python("second", "print('never')", needs=("no_such_package",)),
        python("third", "print('ran')"),
    ]
    outcomes = runner(tmp_path).run(plan)
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "skipped", "done"]
    assert outcomes["first"].reason == "first ended with 3"
    assert "no_such_package" in outcomes["second"].reason
    output = capsys.readouterr().out
    assert "never" not in output
    assert output.index("first: failed") < output.index("second: skipped") < output.index("third: done")
    assert run_gpu.report(outcomes) == 1
    with tarfile.open(tmp_path / "out" / NAME) as found:
        assert {"logs/first.txt", "logs/third.txt", "state.json"} <= set(found.getnames())


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    mark = tmp_path / "runs"
    plan = [python("one", f"open({str(mark)!r}, 'a').write('x')")]
    assert runner(tmp_path).run(plan)["one"].reason == ""
    assert runner(tmp_path).run(plan)["one"].reason == "before"
    assert mark.read_text() == "x"
    again = Runner(places(tmp_path), tmp_path / "out", 1000.0, again=["one"])
    assert again.run(plan)["one"].reason == ""
    assert mark.read_text() == "xx"


def test_a_stage_that_no_longer_fits_is_left(tmp_path: Path) -> None:
    outcomes = runner(tmp_path, limit=60.0).run([python("long", "pass", seconds=100), python("short", "pass")])
    assert [outcome.status for outcome in outcomes.values()] == ["left", "done"]


GOES_ON = """
import pathlib, sys, time
path = pathlib.Path({path!r})
done = path.read_text() if path.exists() else ""
for number in range(len(done), 3):
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    if number == 1 and {slow}:
        time.sleep(60)
pathlib.Path({result!r}).write_text("{{}}")
"""


def test_a_killed_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    """On another, bare machine, from the archive alone; with the process, what it started ends."""
    first, second = places(tmp_path / "1"), places(tmp_path / "2")

    def plan(at: Places, slow: bool) -> list[Stage]:
        partial, result = at.results / "part_cuda.partial", at.results / "part_cuda.json"
        code = GOES_ON.format(path=str(partial), result=str(result), slow=slow)
        return [python("part", code, limit=2, results=("part_cuda.json",))]

    begin = time.monotonic()
    outcome = Runner(first, tmp_path / "out", 1000.0).run(plan(first, True))["part"]
    assert time.monotonic() - begin < 30
    assert outcome.status == "left"
    assert "kept" in outcome.reason
    later = Runner(second, tmp_path / "out", 1000.0)
    later.resume(None)
    assert (second.results / "part_cuda.partial").read_text() == "xx"
    assert later.run(plan(second, False))["part"].status == "done"
    assert (second.results / "part_cuda.partial").read_text() == "xxx"
    # what this machine knows is newer than the archive
    (second.results / "part_cuda.partial").write_text("newer")
    Runner(second, tmp_path / "out", 1000.0).resume(None)
    assert (second.results / "part_cuda.partial").read_text() == "newer"


def test_a_stage_that_measured_nothing_within_its_limit_has_failed(tmp_path: Path) -> None:
    outcome = runner(tmp_path).run([python("stuck", "import time; time.sleep(60)", limit=1)])["stuck"]
    assert outcome.status == "failed"
    assert "measured nothing" in outcome.reason


def fill_cache(folder: Path) -> None:
    """As Triton fills it: a kernel's files, the group that names them by their full paths, and a launcher."""
    kernel, other = folder / "HASH", folder / "OTHER"
    for path in (kernel, other):
        path.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ptx", "k.ttir", "k.source"):
        (kernel / name).write_text(name)
    (kernel / "k.json").write_text("{}")
    children = {path.name: str(path) for path in kernel.iterdir()}
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": children}))
    (other / "triton_poi_fused_0.cubin").write_text("of torch.compile")


def test_the_archive_brings_all_to_another_place(tmp_path: Path) -> None:
    work, cache, home = tmp_path / "work", tmp_path / "cache", tmp_path / "home"
    (work / "logs").mkdir(parents=True)
    (work / "logs" / "long.txt").write_text("begin" + "." * 10**6 + "end")
    (work / "state.json").write_text("{}")
    result = tmp_path / "kernels_cuda.json"
    result.write_text("[2]")
    fill_cache(cache)
    assert {path.name for path in cache_files(cache)} == {"k.cubin", "k.json", "__grp__k.json"}
    sizes = write_archive(tmp_path / NAME, {"results": [result], "reproduce": []}, work, cache, {"commit": "1"})
    assert sizes["archive"] == (tmp_path / NAME).stat().st_size < 10_000
    with tarfile.open(tmp_path / NAME) as found:
        group = found.extractfile("triton/HASH/__grp__k.json").read().decode()  # type: ignore[union-attr]
    assert str(tmp_path) not in group
    read_archive(tmp_path / NAME, home / "results", home / "reproduce", home / "work", home / "cache")
    assert (home / "results" / "kernels_cuda.json").read_text() == "[2]"
    log = (home / "work" / "logs" / "long.txt").read_text()
    assert log.startswith("begin.")
    assert log.endswith(".end")
    group = json.loads((home / "cache" / "HASH" / "__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(home / "cache" / "HASH" / name) for name in ("k.cubin", "k.json")}
    assert (home / "cache" / "HASH" / "k.cubin").read_text() == "k.cubin"


def tune(cache: Path, name: str) -> None:
    """Write down a fastest configuration as dora_peft/ops/kernels/tuning.py does in a process with this cache."""
    from dora_peft.ops.kernels.tuning import Choice, Tuner

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        choices = [Choice({"BLOCK": size}, num_warps=4, num_stages=1) for size in (16, 32)]
        kernel = SimpleNamespace(__name__=name, fn=SimpleNamespace(cache_key=name))
        Tuner(choices, [], [])._write(kernel, ("H100", 64), choices[1])  # type: ignore[arg-type]


def test_what_the_package_remembers_travels_with_the_compiled_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice of configurations, and that its kernels have passed their self-check."""
    pytest.importorskip("triton")
    from dora_peft.ops import passed

    (tmp_path / "work").mkdir()
    wanted = {"gpu": "H100", "triton": "3.6"}
    first, second = tmp_path / "first", tmp_path / "second"
    fill_cache(first)
    tune(first, "kernel")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(first))
    passed.remember(wanted)
    (tuning,) = tuning_files(first)
    assert tuning.name == "kernel.json"
    write_archive(tmp_path / NAME, {}, tmp_path / "work", first, {})
    read_archive(tmp_path / NAME, *(tmp_path / folder for folder in "rpw"), second)
    assert {path.relative_to(second) for path in tuning_files(second)} == {tuning.relative_to(first)}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(second))
    assert passed.holds(wanted)
    assert not passed.holds(wanted | {"gpu": "A100"})


def test_stages_share_the_cache_that_is_archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the package remembers in it; and cuBLAS is told its workspace only where a stage asks for that."""
    from dora_peft.ops import passed

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    at = runner(tmp_path)
    found = {stage.name: at.environment(stage) for stage in build_stages(at.places)}
    assert [name for name, variables in found.items() if "CUBLAS_WORKSPACE_CONFIG" in variables] == ["tests"]
    for variables in found.values():
        monkeypatch.setenv("TRITON_CACHE_DIR", variables["TRITON_CACHE_DIR"])
        passed.remember({"gpu": "H100"})
        assert [path.parent.name for path in cache_files(at.cache)] == ["dora_peft"]


def test_what_was_tuned_beside_others_is_tuned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that: machine code and what was tuned alone stay."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    at = runner(tmp_path)
    fill_cache(at.cache)
    tune(at.cache, "alone")

    def tuning_part(stage: Stage, part: Part, seconds: float) -> int:
        tune(at.cache, part.name)
        return 0

    monkeypatch.setattr(at, "run_part", tuning_part)
    parts = (Part("one", ()), Part("two", ()))
    assert at.run([Stage("warm", 0, 60, parts, parallel=True)])["warm"].status == "done"
    assert {path.name for path in tuning_files(at.cache)} == {"alone.json"}
    assert (at.cache / "HASH" / "k.json").is_file()
    assert at.run([Stage("kernels", 0, 60, parts)])["kernels"].status == "done"
    assert {path.name for path in tuning_files(at.cache)} == {"alone.json", "one.json", "two.json"}


@pytest.mark.parametrize("name", ["../outside", "/outside", "results/../../outside"])
def test_an_archive_writes_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as bad:
        for member in ("manifest.json", name):
            entry = tarfile.TarInfo(member)
            entry.size = 1
            with (tmp_path / "file").open("rb") as content:
                bad.addfile(entry, content)
    with pytest.raises(ValueError, match="outside of its folders"):
        read_archive(tmp_path / "bad.tar.gz", *(tmp_path / folder for folder in ("r", "p", "w", "c")))
    assert not (tmp_path / "r").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match=r"text is not an archive of scripts/gpu\.sh"):
        read_archive(tmp_path / "text", *(tmp_path / folder for folder in "rpwc"))
    assert call("--read", str(tmp_path / "missing")).returncode == 2


def test_the_results_of_another_device_stay_out_of_the_archive(tmp_path: Path) -> None:
    at = runner(tmp_path)
    for name in ("step_llama-512_cpu.json", "step_llama-512_cuda_step.json", "step_llama-512_cuda_step.partial"):
        (at.places.results / name).write_text("{}")
    (at.places.reproduction / "memory_laptop.json").write_text("{}")
    found = at.result_files()
    assert [path.name for path in found["results"]] == [
        "step_llama-512_cuda_step.json",
        "step_llama-512_cuda_step.partial",
    ]
    assert found["reproduce"] == []


def test_the_folder_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPU_OUT", "OUT"):
        monkeypatch.delenv(name, raising=False)
    assert run_gpu.output_folder() == SCRIPTS / "benchmarks" / "results" / "gpu"
    monkeypatch.setenv("OUT", str(tmp_path / "missing"))
    assert run_gpu.output_folder() == SCRIPTS / "benchmarks" / "results" / "gpu"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert run_gpu.output_folder() == tmp_path
    monkeypatch.setenv("GPU_OUT", str(tmp_path / "named"))
    assert run_gpu.output_folder() == tmp_path / "named"


def test_only_this_packages_warnings_are_errors_on_a_gpu(tmp_path: Path) -> None:
    """In the options that the stage of tests gives to pytest, in a test of its own."""
    (part, *_) = next(stage for stage in build_stages(places(tmp_path)) if stage.name == "tests").parts
    test = tmp_path / "test_warnings.py"
    warn = "warnings.warn_explicit('w', UserWarning, 'f.py', 1, module={!r})"
    lines = ["import warnings"]
    lines += [
        f"def test_{n}():\n    {warn.format(m)}" for n, m in (("other", "triton.compiler"), ("ours", "dora_peft.ops"))
    ]
    test.write_text("\n".join(lines))
    command = [
        sys.executable,
        *part.words[:-1],
        str(test),
        "--rootdir",
        str(tmp_path),
        "-c",
        os.devnull,
        "--noconftest",
    ]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 passed" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize("words", [["kernels"], pytest.param([], marks=pytest.mark.slow)], ids=["one", "all"])
def test_dry_run(words: list[str]) -> None:
    result = call("--dry-run", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    names = words or [stage.name for stage in stages.build_stages(Places("cpu", *[Path("x")] * 4))]
    assert all(f"\n{name}: done" in result.stdout for name in names)
    assert result.stdout.splitlines()[-2] == "all stages are done"
    assert "the archive brought home" in result.stdout.splitlines()[-1]
