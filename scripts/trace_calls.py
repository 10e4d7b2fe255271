"""How many Python calls one adapted layer makes, through how many files, and what they cost.

    python scripts/trace_calls.py                                 # the calls of this package, in seconds
    python scripts/trace_calls.py -v                              # each of them, with its caller
    python scripts/trace_calls.py --package ../before             # those of another checkout
    python scripts/trace_calls.py --against ../before             # and the time beside that checkout's, about a minute
    python scripts/trace_calls.py --output scripts/benchmarks/results/trace_after.json

Runs on the CPU. The layer is a 64 x 64 linear with r=8, and gets 16 tokens, computed by torch. Every call of a function
in a file of the package counts, from the layer's own `forward` on. It is a crossing if the nearest caller inside the
package is in another file. Four passes are counted: training with a fresh norm, training with a norm that is due after
an edit of B, the backward pass, and evaluation as it repeats itself.

With `--against` the time of forward and backward with one token is taken in five processes of either checkout, in turn;
it is that of Python and of torch's dispatch, since the products of one token take next to nothing.

Expected result: a table of calls, files and crossings beside the goals, the longest function of the package, and with
`--against` the median time of either checkout and the median ratio. Python 3.12 and later inline comprehensions, so
compare figures of one version.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from common.arguments import positive
from common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
WIDTH, RANK, TOKENS = 64, 8, 16
# At most so many calls, files and crossings.
GOALS: dict[str, dict[str, int]] = {
    "training, fresh norm": {"calls": 30, "files": 6, "crossings": 10},
    "training, norm due": {},
    "backward": {"files": 1},
    "evaluation": {"calls": 12},
}
LONGEST_FUNCTION = 50
TIME_RATIO = 0.7


@dataclass(frozen=True)
class Call:
    """A function of the package that was called, and the file of the nearest caller inside the package."""

    file: str
    function: str
    caller: str | None

    @property
    def crosses(self) -> bool:
        return self.caller is not None and self.caller != self.file


def import_package(checkout: Path) -> ModuleType:
    """The package `dora_peft` of a checkout.

    Raises:
        ValueError: there is none, or another one was imported before.
    """
    checkout = checkout.resolve()
    if not (checkout / "dora_peft" / "__init__.py").is_file():
        raise ValueError(f"{checkout}: expected a checkout with the folder dora_peft, found none.")
    sys.path.insert(0, str(checkout))
    import dora_peft

    found = Path(dora_peft.__file__).resolve().parents[1]
    if found != checkout:
        raise ValueError(f"expected dora_peft from {checkout}, found it imported from {found}; use a fresh process.")
    return dora_peft


def build_layer(package: ModuleType) -> nn.Module:
    """A linear layer with an adapter that was trained for one step."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    model = get_peft_model(base, package.DoraConfig(r=RANK, target_modules=["0"]))  # type: ignore[arg-type]
    layer: Any = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    return layer


def record(folder: str, run: Callable[[], Tensor | None]) -> tuple[list[Call], Tensor | None]:
    """The calls into the files of `folder` while `run` runs, in their order, and what it returns."""
    calls = []

    def name(frame: FrameType) -> str:
        return os.path.relpath(frame.f_code.co_filename, folder)

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(folder):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(folder):
            caller = caller.f_back
        calls.append(Call(name(frame), frame.f_code.co_name, None if caller is None else name(caller)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        result = run()
    finally:
        sys.setprofile(before)
    return calls, result


def trace(package: ModuleType) -> dict[str, list[Call]]:
    """The calls of each pass."""
    folder = str(Path(package.__file__ or "").resolve().parent) + os.sep
    x = torch.randn(TOKENS, WIDTH)
    found: dict[str, list[Call]] = {}
    with package.implementation("torch"):
        layer: Any = build_layer(package)
        layer(x).sum().backward()
        with torch.no_grad():
            layer.lora_B["default"].weight.add_(0.1)
        due, _ = record(folder, lambda: layer(x))
        found["training, fresh norm"], y = record(folder, lambda: layer(x))
        found["training, norm due"] = due
        loss = y.sum()  # type: ignore[union-attr]
        found["backward"], _ = record(folder, loss.backward)
        layer.eval()
        with torch.no_grad():
            layer(x)
            found["evaluation"], _ = record(folder, lambda: layer(x))
    return found


def functions(folder: Path) -> Iterator[tuple[int, str]]:
    """Length in lines and place of every function; Triton kernels and their launchers are left out."""
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        if "kernels" in str(place):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{place}:{node.name}"


def time_layer(package: ModuleType, rounds: int, repeats: int = 200) -> float:
    """Microseconds of one forward and backward pass with one token: the median over the rounds."""
    torch.set_num_threads(1)
    x, grad = torch.randn(1, WIDTH, requires_grad=True), torch.ones(1, WIDTH)
    times = []
    with package.implementation("torch"):
        layer = build_layer(package)
        for number in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(repeats):
                layer(x).backward(grad)
            # The first round warms up.
            if number:
                times.append(1e6 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)


def time_in_process(checkout: Path, rounds: int) -> float:
    """`time_layer` of a checkout's package, in a separate process."""
    command = [sys.executable, "-W", "ignore", __file__, "--package", str(checkout), "--time", "--rounds", str(rounds)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{checkout}: timing ended with status {result.returncode}; its message stands above.")
    return float(json.loads(result.stdout))


def compare_times(checkout: Path, other: Path, processes: int, rounds: int) -> dict[str, Any]:
    """Times of two checkouts in pairs of processes whose order alternates, and the median of the paired ratios."""
    times: dict[str, list[float]] = {"old": [], "new": []}
    for pair in range(processes):
        for name in list(times)[:: -1 if pair % 2 else 1]:
            times[name].append(time_in_process(other if name == "old" else checkout, rounds))
    ratios = [new / old for new, old in zip(times["new"], times["old"], strict=True)]
    return {
        "commit": commit_of(other),
        "processes": processes,
        "rounds": rounds,
        "old_us": times["old"],
        "new_us": times["new"],
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def commit_of(checkout: Path) -> str | None:
    """The git commit of a checkout, with "+" if its package differs from it; None without git."""
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        edits = subprocess.run([*git, "status", "--porcelain", "dora_peft"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return None
    return commit + ("+" if edits.strip() else "") if commit else None


def counts(calls: Sequence[Call]) -> dict[str, int]:
    files = {call.file for call in calls}
    return {"calls": len(calls), "files": len(files), "crossings": sum(call.crosses for call in calls)}


def verdict(found: dict[str, int], goals: dict[str, int]) -> str:
    """Each goal, and whether all are met."""
    if not goals:
        return ""
    wanted = ", ".join(f"{name} at most {most}" for name, most in goals.items())
    return f"{wanted}: {'met' if all(found[name] <= most for name, most in goals.items()) else 'missed'}"


def format_table(passes: dict[str, list[Call]], verbose: bool) -> str:
    lines = [f"{'':<22}{'calls':>7}{'files':>7}{'crossings':>11}   goal"]
    for name, calls in passes.items():
        found = counts(calls)
        row = f"{name:<22}{found['calls']:>7}{found['files']:>7}{found['crossings']:>11}   "
        lines.append((row + verdict(found, GOALS[name])).rstrip())
        if verbose:
            lines += [f"    {c.file}:{c.function}{f'  <- {c.caller}' if c.crosses else ''}" for c in calls]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=ROOT, metavar="PATH", help="checkout to trace (this one)")
    parser.add_argument("--against", type=Path, metavar="PATH", help="checkout to compare the time with")
    parser.add_argument("--processes", type=positive, default=5, help="of each checkout, for --against (5)")
    parser.add_argument("--rounds", type=positive, default=30, help="timed rounds of a process (30)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every call")
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        package = import_package(options.package)
    except ValueError as error:
        parser.error(str(error))
    if options.time:
        print(json.dumps(time_layer(package, options.rounds)))
        return

    passes = trace(package)
    lines, place = max(functions(options.package / "dora_peft"))
    print(format_table(passes, options.verbose))
    print(f"longest function: {place}, {lines} lines   {verdict({'lines': lines}, {'lines': LONGEST_FUNCTION})}")
    report: dict[str, Any] = {
        "commit": commit_of(options.package),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trace": {
            name: counts(calls) | {"called": [f"{c.file}:{c.function}" for c in calls]}
            for name, calls in passes.items()
        },
        "longest_function": {"place": place, "lines": lines},
    }
    if options.against is not None:
        report["time"] = compared = compare_times(options.package, options.against, options.processes, options.rounds)
        old, new = (statistics.median(compared[name]) for name in ("old_us", "new_us"))
        ratio = compared["ratio"]
        print(
            f"one token, forward and backward: {old:.0f} us -> {new:.0f} us, ratio {ratio['median']:.3f} "
            f"[{ratio['min']:.3f}, {ratio['max']:.3f}]   at most {TIME_RATIO}: "
            f"{'met' if ratio['median'] <= TIME_RATIO else 'missed'}"
        )
    print(f"commit {report['commit'] or 'unknown'}, Python {report['python']}, torch {report['torch']}")
    if options.output is not None:
        write_json(options.output, report)
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
