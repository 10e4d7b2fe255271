"""How the stages of scripts/gpu.sh run: in order, within limits, resumed, skipped by name, archived after each."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import digest, write_json
from gpu.archive import NAME, read_archive, tuning_files, write_archive
from gpu.machine import gpu_names, versions
from gpu.stages import ALWAYS, ROOT, Part, Places, Stage

# for the archive, at a call's end
RESERVE = 8
# what a process gets to end in, after it was asked to
GRACE = 3


def describe_files() -> str:
    """What a result is of, where there is no repository to name a commit."""
    sources = [*(ROOT / "dora_peft").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    return f"files-{digest(*sorted(sources))}"


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclass
class Outcome:
    """How a stage ended: done, skipped, failed, left (another call goes on); with the reason."""

    status: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Runner:
    """One call.

    Attributes:
        places: Where it reads and writes.
        out: Folder of the archive.
        limit: Seconds of the whole call.
        again: Stages that run although they are done.
        end_when: Asked several times a second; ends what runs as a limit does. For rehearsals.
        side_by_side: Stages that run at a time behind the first, more than one in rehearsals alone.
    """

    places: Places
    out: Path
    limit: float
    again: Sequence[str] = ()
    end_when: Callable[[], bool] = lambda: False
    side_by_side: int = 1
    start: float = field(default_factory=time.monotonic)
    jobs: int = field(default_factory=lambda: max(1, min(8, (os.cpu_count() or 2) - 1)))

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.cache = Path(os.environ.get("TRITON_CACHE_DIR") or self.places.work / "triton")
        self.state_path = self.places.work / "state.json"
        (self.places.work / "logs").mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"stages": {}, "parts": {}}
        self.read_state()
        packages = (f"{name} {number}" for name, number in versions().items())
        tests = sorted((ROOT / "tests").rglob("*.py"))
        # what a check that passed has passed with
        self.key = "; ".join([describe_files(), digest(*tests), *packages, *gpu_names()])

    def read_state(self) -> None:
        if self.state_path.is_file():
            self.state = json.loads(self.state_path.read_text(encoding="utf-8"))

    def resume(self, archive: Path | None) -> None:
        """Take over what an archive has; without a name the one in `out`, unless this machine knows more itself.

        Raises:
            ValueError: The archive cannot be read.
        """
        found = archive or self.out / NAME
        if archive is None and (self.state_path.is_file() or not found.is_file()):
            return
        files = read_archive(found, self.places.results, self.places.reproduction, self.places.work, self.cache)
        self.read_state()
        print(f"went on from {found}: " + ", ".join(f"{len(names)} of {folder}" for folder, names in files.items()))

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.start)

    def environment(self, stage: Stage | None = None) -> dict[str, str]:
        work = self.places.work
        added = {
            # the package remembers there as well that its kernels have passed, see dora_peft/ops/passed.py
            "TRITON_CACHE_DIR": str(self.cache),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DORA_PEFT_COMMIT": os.environ.get("DORA_PEFT_COMMIT") or describe_files(),
        }
        if stage is not None and stage.deterministic:
            # without it cuBLAS refuses to be deterministic; with it, it takes other memory and maybe other kernels
            added["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if self.places.toy:
            added |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **added}

    def run(self, stages: Sequence[Stage]) -> dict[str, Outcome]:
        """All of them, as far as the time goes; writes the archive after each that ran."""
        first = [stage for stage in stages if stage.always]
        rest = [stage for stage in stages if not stage.always]
        outcomes = {stage.name: self.settle(stage) for stage in first}
        broken = any(outcome.status == "failed" for outcome in outcomes.values())
        no_gpu = "there is no GPU that torch can use, see stage versions" if broken else None
        with ThreadPoolExecutor(self.side_by_side) as pool:
            ended = list(pool.map(lambda stage: self.settle(stage, no_gpu), rest))
        return outcomes | {stage.name: outcome for stage, outcome in zip(rest, ended, strict=True)}

    def settle(self, stage: Stage, obstacle: str | None = None) -> Outcome:
        """Run a stage, or say why not."""
        missing = [name for name in (*ALWAYS, *stage.needs) if not has_package(name)]
        if missing:
            obstacle = f"needs {' and '.join(missing)}, which is not installed"
        if self.is_done(stage):
            outcome = Outcome("done", "before")
        elif obstacle is not None:
            outcome = Outcome("skipped", obstacle)
        elif self.left() < stage.seconds + RESERVE:
            outcome = Outcome("left", f"it takes about {stage.seconds} s, and {max(0, int(self.left()))} are left")
        else:
            outcome = self.run_stage(stage)
        self.note(stage, outcome)
        return outcome

    def is_done(self, stage: Stage) -> bool:
        if stage.always or stage.name in self.again:
            return False
        if stage.results:
            return all(self.is_whole(name) for name in stage.results)
        return all(self.passed(stage, part) for part in stage.parts)

    def is_whole(self, name: str) -> bool:
        """Whether a result is there; the reproduction writes its files after every run, with a summary at the end."""
        path = self.places.reproduction / name
        if path.is_file() and path.parent != self.places.results:
            text = path.read_text(encoding="utf-8")
            # that of a CPU may lie there
            return '"summary"' in text and f'"device": "{self.places.device}"' in text
        return (self.places.results / name).is_file()

    def passed(self, stage: Stage, part: Part) -> bool:
        """Whether a part has run, by these files where it decides right and wrong."""
        found = self.state["parts"].get(f"{stage.name}/{part.name}")
        return found is not None and stage.name not in self.again and found == self.key

    def run_stage(self, stage: Stage) -> Outcome:
        begin = time.monotonic()
        budget = min(float(stage.limit), self.left() - RESERVE)
        print(f"\n=== {stage.name}: about {stage.seconds} s, at most {budget:.0f} ===", flush=True)
        parts = [part for part in stage.parts if stage.always or not self.passed(stage, part)]
        before = self.progress(stage)
        tuned = tuning_files(self.cache)

        def run_part(part: Part) -> int | None:
            status = self.run_part(stage, part, begin + budget - time.monotonic())
            if status == 0:
                self.state["parts"][f"{stage.name}/{part.name}"] = self.key
            return status

        if stage.parallel:
            with ThreadPoolExecutor(self.jobs) as pool:
                statuses = list(pool.map(run_part, parts))
            # what was timed while others ran is tuned again
            for path in tuning_files(self.cache) - tuned:
                path.unlink()
        else:
            statuses = [run_part(part) for part in parts]
        seconds = time.monotonic() - begin
        failed = [f"{part.name} ended with {status}" for part, status in zip(parts, statuses, strict=True) if status]
        if None in statuses:
            went_on = self.progress(stage) != before
            reason = f"ended after {seconds:.0f} s"
            if went_on or budget < stage.limit:
                return Outcome("left", f"{reason}; what it has measured is kept" if went_on else reason, seconds)
            return Outcome("failed", f"{reason}, and had measured nothing", seconds)
        if failed:
            return Outcome("failed", "; ".join(failed), seconds)
        return Outcome("done", "", seconds)

    def progress(self, stage: Stage) -> dict[str, tuple[int, int]]:
        """The files that a stage goes on from, by size and time, and its parts that are done."""
        stems = {Path(name).stem for name in stage.results}
        files = [self.places.results / f"{stem}.partial" for stem in stems]
        files += [self.places.reproduction / f"{stem}.json" for stem in stems]
        if stage.name == "checks":
            files.append(self.places.work / f"checks_{self.places.device}.jsonl")
        found = {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()}
        done = [name for name in self.state["parts"] if name.startswith(f"{stage.name}/")]
        return found | dict.fromkeys(done, (0, 0))

    def run_part(self, stage: Stage, part: Part, seconds: float) -> int | None:
        """A process's exit status, None if it was ended at its limit; its output is shown and kept in logs/."""
        if seconds <= 0:
            return None
        name = stage.name if part.name == stage.name else f"{stage.name}_{part.name}"
        log = self.places.work / "logs" / f"{name}.txt"
        with log.open("w", encoding="utf-8", errors="replace") as kept:
            process = subprocess.Popen(
                [sys.executable, *part.words], cwd=ROOT, env=self.environment(stage), text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            ended, over = threading.Event(), threading.Event()
            deadline = time.monotonic() + seconds

            def watch() -> None:
                while not over.wait(0.1):
                    if time.monotonic() > deadline or self.end_when():
                        ended.set()
                        stop(process)
                        return

            watcher = threading.Thread(target=watch)
            watcher.start()
            several = stage.parallel or self.side_by_side > 1
            try:
                assert process.stdout is not None
                with process.stdout:
                    for line in process.stdout:
                        kept.write(line)
                        kept.flush()
                        print(f"{name}: {line}" if several else line, end="", flush=True)
                status = process.wait()
            except BaseException:
                stop(process)
                raise
            finally:
                over.set()
                watcher.join()
            if ended.is_set():
                kept.write(f"\nended after {seconds - deadline + time.monotonic():.0f} s\n")
        return None if ended.is_set() and status != 0 else status

    def note(self, stage: Stage, outcome: Outcome) -> None:
        """Remember and print how a stage ended, and bring the archive up to date."""
        words = f"{stage.name}: {outcome.status}" + (f", {outcome.reason}" if outcome.reason else "")
        print(words + (f"; {outcome.seconds:.0f} s" if outcome.seconds else ""), flush=True)
        if outcome.status == "left" and not outcome.seconds:
            return
        if (outcome.status, outcome.reason) != ("done", "before"):
            with self.lock:
                self.state["stages"][stage.name] = {
                    "status": outcome.status, "reason": outcome.reason, "seconds": round(outcome.seconds, 1),
                    "expected_seconds": stage.seconds,
                }  # fmt: skip
                write_json(self.state_path, self.state)
                self.archive()

    def result_files(self) -> Mapping[str, list[Path]]:
        """What belongs to this device: names of results have it between underscores."""
        device, folder = self.places.device, self.places.results
        results = [
            p for p in folder.glob("*") if p.suffix in (".json", ".png", ".partial") and device in p.stem.split("_")
        ]
        reproduction = [p for p in self.places.reproduction.glob("*.json") if p.stem.startswith("memory_full")]
        accuracy = self.places.reproduction / "accuracy_laptop.json"
        if accuracy.is_file() and '"device": "cuda"' in accuracy.read_text(encoding="utf-8"):
            reproduction.append(accuracy)
        drawn = [path.with_suffix(".png") for path in reproduction]
        return {"results": sorted(results), "reproduce": sorted([*reproduction, *filter(Path.is_file, drawn)])}

    def archive(self) -> None:
        commit = self.environment()["DORA_PEFT_COMMIT"]
        manifest = {"gpus": gpu_names(), "versions": versions(), "files": describe_files(), "commit": commit}
        manifest |= {"stages": self.state["stages"]}
        path = self.out / NAME
        sizes = write_archive(path, self.result_files(), self.places.work, self.cache, manifest)
        parts = ", ".join(f"{folder} {size / 2**20:.2f}" for folder, size in sizes.items() if folder != "archive")
        print(f"{path}: {sizes['archive'] / 2**20:.2f} MiB ({parts} unpacked)", flush=True)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
