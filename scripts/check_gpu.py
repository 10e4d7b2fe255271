"""Check on a GPU that DoRA layers compute what the reference does: 40 checks, each with its errors in one line.

    python scripts/check_gpu.py                  # on a GPU; about two minutes, most of them for compiling kernels
    python scripts/check_gpu.py --list
    python scripts/check_gpu.py layer norm_large # those whose names begin so
    python scripts/check_gpu.py --again          # also those that have passed

In Triton's interpreter, without a GPU, in a minute; what only a GPU can show is skipped:

    TRITON_INTERPRET=1 python scripts/check_gpu.py --device cpu

Needs torch, transformers, peft and on a GPU Triton; neither pytest nor bitsandbytes, whose check is skipped without it.
A check compares outputs and all gradients of real layers with dora_peft/reference.py in float64, and fails if an error
is larger than what the same formula is off by in the layer's dtype, or if dora_peft warns; other packages' warnings are
collected. A kernel that fails the package's own check, for which layers would not use any, is what the check
auto_takes_kernels finds; all others run by the kernels nevertheless. Groups of checks run in processes of their own:
one that crashes or hangs fails, and the rest goes on. What has passed with these files, versions and GPU is not
repeated, so that a killed run goes on where it was.

Expected result: a line for each check, "40 checks: N passed, ..." last, exit status 0 if none failed, and
scripts/benchmarks/results/checks_DEVICE.json with errors, device, versions and commit. If something fails on your GPU,
please post that file in an issue.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.arguments import positive
from common.files import digest, write_json
from gpu.machine import describe_gpu, gpu_names, versions
from gpu.registry import GROUPS, NAMES, PACKAGE, format_result, group_of, run_check

ROOT = PACKAGE.parent
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
# of one check, its compiling included
CHECK_SECONDS = 150


def chosen(words: Sequence[str]) -> list[str]:
    """The names that begin with one of the words, all without any."""
    for word in words:
        if not any(name.startswith(word) for name in NAMES):
            raise SystemExit(f"error: no check begins with {word!r}; --list names them")
    return [name for name in NAMES if not words or name.startswith(tuple(words))]


def key() -> str:
    """What a result belongs to: the files, the versions, the GPUs."""
    files = [*PACKAGE.rglob("*.py"), *Path(__file__).with_name("gpu").glob("*.py")]
    return "; ".join(
        [digest(*sorted(files)), *(f"{name} {number}" for name, number in versions().items()), *gpu_names()]
    )


def read_log(path: Path, of: str) -> dict[str, dict[str, Any]]:
    """The last entry of each check in a log of workers, of this key alone; status "begun" if it only began."""
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            # the last line of a worker that was killed
            except json.JSONDecodeError:
                continue
            if entry.pop("key") == of:
                found[entry["name"]] = entry
    return found


def append(path: Path, entry: dict[str, Any], of: str) -> None:
    """One line in one call, so that workers do not mix theirs."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry | {"key": of}) + "\n")


def work(options: argparse.Namespace) -> None:
    """A worker: its checks one after the other, each noted before and after."""
    import torch

    device = torch.device(options.device)
    for name in options.names:
        append(options.log, {"name": name, "status": "begun"}, options.key)
        # ends the process, also one that waits for the GPU for ever
        faulthandler.dump_traceback_later(options.check_seconds, exit=True)
        result = run_check(name, device, options.implementation)
        faulthandler.cancel_dump_traceback_later()
        append(options.log, result, options.key)
        print(format_result(result), flush=True)
        if result["status"] == "failed" and device.type == "cuda":
            # an illegal access spoils the process for what follows: another one goes on
            torch.cuda.synchronize()


def run_group(names: list[str], options: argparse.Namespace) -> None:
    """Workers until each of these checks has a result."""
    left = names
    while left:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--device", options.device, *left]
        command += ["--implementation", options.implementation, "--log", str(options.log), "--key", options.key]
        command += ["--check-seconds", str(options.check_seconds)]
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        found = read_log(options.log, options.key)
        for name in left:
            if found.get(name, {}).get("status") == "begun":
                reason = f"its process ended with status {status}; its message stands above"
                result = {"name": name, "status": "failed", "reason": reason, "seconds": 0.0, "figures": {}}
                append(options.log, result, options.key)
                print(format_result(result), flush=True)
        found = read_log(options.log, options.key)
        before, left = left, [name for name in left if name not in found]
        if left == before:
            # it has not even begun
            raise SystemExit(
                f"error: the process of {', '.join(left)} ended with status {status} before its first check"
            )


def store(options: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All results of this key in one file, with the machine; returns them."""
    import torch

    from common.machine import describe_machine

    found = read_log(options.log, options.key)
    checks = [found[name] for name in NAMES if name in found]
    machine = describe_machine(torch.device(options.device))
    write_json(options.results / f"checks_{options.device.partition(':')[0]}.json", machine | {"checks": checks})
    return {name: found[name] for name in names}


def store_versions(options: argparse.Namespace) -> int:
    """Device, driver, versions, compiler and commit in versions_DEVICE.json; 1 if there is no GPU."""
    import torch

    from common.machine import describe_machine

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU; nvidia-smi: {'; '.join(gpu_names()) or 'not there'}")
        return 1
    machine = describe_machine(device)
    found = {"device": machine.pop("device"), **describe_gpu(options.device), **machine}
    found["packages"] = versions()
    path = options.results / f"versions_{device.type}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["machines"] if path.is_file() else []
    machines = [other for other in before if other != found] + [found]
    write_json(path, {"machines": machines})
    for name, value in found.items():
        print(f"{name:>18}  {value}")
    if len(machines) > 1:
        print(f"note: results lie here from {len(machines)} machines or versions; {path} has them all")
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names (all)")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--versions", action="store_true", help="write and print what the machine has, check nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--implementation", default="triton", help="as dora_peft.implementation takes it (triton)")
    parser.add_argument("--jobs", type=positive, help="processes at a time (half of the cores, at most 8; 1 on a CPU)")
    parser.add_argument("--again", action="store_true", help="also what has passed with these files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--log", type=Path, help="where a killed run is remembered (outputs/gpu/checks_DEVICE.jsonl)")
    parser.add_argument("--check-seconds", type=positive, default=CHECK_SECONDS, help=f"limit of one ({CHECK_SECONDS})")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.log is None:
        options.log = ROOT / "outputs" / "gpu" / f"checks_{options.device.partition(':')[0]}.jsonl"
    if options.jobs is None:
        options.jobs = 1 if options.device == "cpu" else max(1, min(8, (os.cpu_count() or 2) // 2))
    return options


def main() -> int:
    options = read_options()
    if options.worker:
        work(options)
        return 0
    names = chosen(options.names)
    if options.list:
        print("\n".join(names))
        return 0
    if options.versions:
        return store_versions(options)
    options.key = key()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    # what was begun by a killed run is done again
    known = {} if options.again else read_log(options.log, options.key)
    left = [name for name in names if known.get(name, {}).get("status") not in ("passed", "skipped")]
    if options.again or left != names:
        kept = [known[name] for name in NAMES if name in known and name not in left]
        options.log.write_text("", encoding="utf-8")
        for entry in kept:
            append(options.log, entry, options.key)
    for name in names:
        if name not in left:
            print(f"{format_result(known[name])}  (done before)", flush=True)
    groups = [[name for name in left if group_of(name) == group] for group in GROUPS] if options.jobs > 1 else [left]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(run_group, names_of, options) for names_of in groups if names_of]:
            done.result()
    found = store(options, names)
    counts = {status: sum(r["status"] == status for r in found.values()) for status in ("passed", "skipped", "failed")}
    print(f"\n{len(names)} checks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
