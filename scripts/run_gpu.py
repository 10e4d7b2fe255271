"""The stages of a first visit to a GPU; `bash scripts/gpu.sh` calls this and its head says how.

    python scripts/run_gpu.py --list
    python scripts/run_gpu.py --dry-run     # all of them at toy size on the CPU, in about 3 minutes

The rehearsal ends a stage half-way, forgets everything but the archive, goes on from it as a bare machine would, and
compares what the last archive brings home with what was measured. Expected result: "all stages are done" last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu.archive import NAME, read_archive
from gpu.runner import Outcome, Runner
from gpu.stages import ROOT, Places, Stage, build_stages

RESULTS = ROOT / "scripts" / "benchmarks" / "results"
REPRODUCTION = ROOT / "scripts" / "reproduce" / "results"
# of a call that may last ten minutes: the machine's start and its transfers count as well
LIMIT = 510


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="these alone (all)")
    parser.add_argument("--list", action="store_true", help="print the stages with their seconds")
    parser.add_argument("--again", action="store_true", help="run them although they are done")
    parser.add_argument("--read", type=Path, metavar="ARCHIVE", help="put its files into the folders of results")
    parser.add_argument("--resume-from", type=Path, metavar="ARCHIVE", help="go on from it")
    parser.add_argument("--dry-run", action="store_true", help="at toy size on the CPU")
    parser.add_argument("--limit", type=float, default=float(os.environ.get("LIMIT", LIMIT)), help="seconds (LIMIT)")
    options = parser.parse_args(argv)
    for archive in (options.read, options.resume_from):
        if archive is not None and not archive.is_file():
            parser.error(f"there is no file {archive}")
    return options


def places_of(device: str) -> Places:
    """The folders that the environment names, or those of the repository."""
    results = Path(os.environ.get("RESULTS") or RESULTS).resolve()
    work = Path(os.environ.get("GPU_WORK") or ROOT / "outputs" / "gpu").resolve()
    return Places(device, results, REPRODUCTION, work)


def output_folder() -> Path:
    if named := os.environ.get("GPU_OUT"):
        return Path(named).resolve()
    if (named := os.environ.get("OUT")) and Path(named).is_dir():
        return Path(named).resolve()
    return RESULTS / "gpu"


def choose(stages: Sequence[Stage], words: Sequence[str]) -> list[Stage]:
    names = [stage.name for stage in stages]
    for word in words:
        if word not in names:
            print(f"error: no stage '{word}'; there are: {' '.join(names)}", file=sys.stderr)
            raise SystemExit(2)
    return [stage for stage in stages if not words or stage.name in words]


def report(outcomes: dict[str, Outcome]) -> int:
    """Print what is done and what is not; 1 if something failed."""
    print()
    for status in ("skipped", "failed", "left"):
        names = [f"{name} ({o.reason})" for name, o in outcomes.items() if o.status == status]
        if names:
            print(f"{'left for another call' if status == 'left' else status}: {', '.join(names)}")
    statuses = {outcome.status for outcome in outcomes.values()}
    if not statuses & {"failed", "left"}:
        print("all stages are done")
    return int("failed" in statuses)


def list_stages(stages: Sequence[Stage]) -> None:
    for stage in stages:
        needs = f", needs {' and '.join(stage.needs)}" if stage.needs else ""
        print(f"{stage.name:<18} about {stage.seconds:>3} s, at most {stage.limit} s{needs}")


def rehearse(words: Sequence[str]) -> int:
    """All stages at toy size on the CPU, with an interruption, a bare machine that goes on, and the reading at home."""
    os.environ.pop("TRITON_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        parts = ("results", "reproduce", "work")
        first, second, home = (Places("cpu", *(Path(folder, str(n), part) for part in parts)) for n in (1, 2, 3))
        if not words or "checks" in words:
            interrupt(first, out)
            shutil.rmtree(first.results.parent)
        runner = Runner(second, out, 10_000.0, side_by_side=2)
        runner.resume(None)
        status = report(runner.run(choose(build_stages(second), words)))
        found = read_archive(out / NAME, home.results, home.reproduction, home.work, home.work / "triton")
        for one, other in ((second.results, home.results), (second.reproduction, home.reproduction)):
            for path in one.glob("*.json"):
                if (other / path.name).read_bytes() != path.read_bytes():
                    raise SystemExit(f"error: the archive does not bring home {path.name}")
        print(f"the archive brought home {sum(map(len, found.values()))} files")
        return status


def interrupt(places: Places, out: Path) -> None:
    """End the checks as a call's end does, once some of them are done."""
    log = places.work / "checks_cpu.jsonl"

    def some_are_done() -> bool:
        return log.is_file() and log.read_text(encoding="utf-8").count('"passed"') >= 3

    runner = Runner(places, out, 10_000.0, end_when=some_are_done)
    outcome = runner.run([stage for stage in build_stages(places) if stage.name == "checks"])["checks"]
    if outcome.status != "left":
        raise SystemExit(f"error: a stage that was ended half-way is {outcome.status}, {outcome.reason}")


def main() -> int:
    options = read_options()
    places = places_of("cuda")
    if options.list:
        list_stages(build_stages(places))
        return 0
    if options.read is not None:
        found = read_archive(options.read, places.results, places.reproduction, places.work, places.work / "triton")
        for folder, names in found.items():
            print(
                f"{folder}: {len(names)} files"
                + (f", {', '.join(names)}" if folder in ("results", "reproduce") else "")
            )
        return 0
    if options.dry_run:
        return rehearse(options.stages)
    # versions say what the others' figures belong to
    stages = choose(build_stages(places), options.stages and [*options.stages, "versions"])
    again = [stage.name for stage in stages] if options.again else []
    runner = Runner(places, output_folder(), options.limit, again=again)
    runner.resume(options.resume_from)
    return report(runner.run(stages))


if __name__ == "__main__":
    sys.exit(main())
