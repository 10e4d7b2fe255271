"""What every Triton kernel needs on the GPUs that it is for, by compiling it: registers, stack, shared memory, bytes.

    python scripts/kernel_table.py              # bf16, ranks 16, 64 and 384, six GPUs; needs none, 5 minutes on 2 cores
    python scripts/kernel_table.py --all        # also fp16 and fp32, 4-bit weights, biases and gradients by columns
    python scripts/kernel_table.py --capabilities 90 --examples compose --results FOLDER    # some of it, to look at
    python scripts/kernel_table.py --examples norm --keep    # these rows anew, the others as they are stored

The launches are those of the layers of a Llama-8B at 2,048 and 8,192 tokens, recorded from the launchers themselves.
The check and the refresh of all layers are those of the whole model, 32 times 7 linear layers.
Beside what the compiled code takes, the table predicts how long a launch takes on an H100:

    max(bytes that must move / 3.0 TB/s, bytes asked for / 5.5 TB/s, products / rate, instructions issued / issue rate)
    * programs of the busiest of 132 processors / programs of the average one

and, for programs that take one block after another, the same for blocks and programs; with 600 TFLOP/s for bf16 by the
matrix units' own instructions, 400 by the older ones, half of that for tf32, a sixth for fp32 as three products of
tf32, and 4 instructions a processor and cycle at 1.7 GHz. 3.0 TB/s is what a large copy reaches of the 3.35 on the data
sheet. It is a prediction: no GPU was asked, and what it leaves out, such as latencies, makes a launch slower.

Expected result: the table in scripts/benchmarks/results/kernel_table.md, and all of it in kernel_table.json beside it.
Compiled kernels are kept in TRITON_CACHE_DIR, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# before Triton is imported
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "dora_peft_kernel_table"))

import torch
import triton

from benchmarks.kernel_compiler import CAPABILITIES, SHARED_LIMIT, Usage, compile_for, offered, usage
from benchmarks.kernel_examples import EXAMPLES, OF_ALL, Case, Launch, launches
from benchmarks.kernel_work import Work, work
from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import replacing
from common.machine import describe_machine

# [out, in] of one layer of a Llama-8B
SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
# of all 32 layers
MODEL = tuple(SHAPES[name] for name in ["q, o", "q, o", "k, v", "k, v", "gate, up", "gate, up", "down"] * 32)
TOKENS = (2048, 8192)
PROCESSORS, CLOCK, ISSUED = 132, 1.7e9, 4
MEMORY, CACHE = 3.0e12, 5.5e12
RATES = {"HGMMA": 600e12, "HMMA": 400e12}
VARIANTS = ("with_bias", "four_bit", "by_columns", "on_device")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Entry(NamedTuple):
    """A kernel in one configuration, compiled for one kind of GPU, for one kind of layer."""

    case: Case
    example: str
    kernel: str
    number: int
    capability: int


def cases(everything: bool) -> list[tuple[Case, list[str]]]:
    """Layers, and the examples that are worth compiling for them."""
    ranks = [example for example in EXAMPLES if "compose" in example or "dropped" in example or "low rank" in example]
    usual = [(Case(), list(EXAMPLES)), (Case(rank=64), list(EXAMPLES)), (Case(rank=384), ranks)]
    if not everything:
        return usual
    types = [(BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)]
    others = [Case(rank=rank, dtype=dtype, factors=factors) for rank in (16, 64, 384) for dtype, factors in types]
    others += [Case(rank=rank, with_bias=True, four_bit=True, by_columns=True, on_device=True) for rank in (1, 8, 32)]
    return [*usual, *((case, list(EXAMPLES)) for case in others)]


def launch_of(entry: Entry, case: Case | None = None) -> Launch:
    """The entry's launch, or that of another layer."""
    found = launches(case or entry.case, [entry.example])
    return next(launch for launch in found if launch.name == entry.kernel)


def measure(entry: Entry) -> Usage:
    launch = launch_of(entry)
    return usage(compile_for(entry.capability, launch, launch.configs()[entry.number]))


def predicted_seconds(done: Work, programs: int, warps: int, found: Usage, precision: object) -> float:
    """By the formula at the top of this file; `precision` of fp32's products as in ops/kernels/options.py."""
    rate = RATES.get(found.units, 0) / {"tf32": 2, "tf32x3": 6}.get(precision, 1)
    if done.blocks:
        issued = done.blocks * warps * (found.loop + found.inner * (done.iterations - 1))
    else:
        issued = programs * warps * (found.instructions / done.branches + found.loop * (done.iterations - 1))
    parts = [done.ideal / MEMORY, done.asked / CACHE, issued / (PROCESSORS * ISSUED * CLOCK)]
    if rate:
        parts.append(done.flops / rate)
    return max(parts) * uneven(programs, PROCESSORS) * (uneven(done.blocks, programs) if done.blocks else 1)


def uneven(pieces: int, takers: int) -> float:
    """The pieces of the taker that has most of them by the average."""
    return -(-pieces // takers) * takers / pieces


def predictions(entry: Entry, found: Usage) -> list[dict[str, object]]:
    """Bytes and time of a launch on an H100, for each layer and number of tokens."""
    rows = []
    cases = {name: {"out": out, "features": features} for name, (out, features) in SHAPES.items()}
    for layer, changes in ({"model": {"group": MODEL}} if entry.example == OF_ALL else cases).items():
        for tokens in TOKENS:
            launch = launch_of(entry, dataclasses.replace(entry.case, tokens=tokens, **changes))
            config = launch.configs()[entry.number]
            done, programs = work(launch, config), launch.programs(config)
            if done is not None:
                precision = launch.arguments.get("PRECISION")
                seconds = predicted_seconds(done, programs, config.num_warps, found, precision)
                rows.append(
                    {"layer": layer, "tokens": tokens, "programs": programs, "ideal_bytes": done.ideal,
                     "asked_bytes": done.asked, "predicted_us": round(seconds * 1e6, 2)}
                )  # fmt: skip
    return rows


def collect(options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each kernel, configuration and kind of layer, with what each kind of GPU needs for it."""
    entries = [
        Entry(case, launch.example, launch.name, number, capability)
        for case, examples in cases(options.all)
        for launch in launches(case, [example for example in examples if example in options.examples])
        for number, config in enumerate(launch.configs())
        for capability in options.capabilities
        if config in offered(capability, launch)
    ]
    rows: dict[Entry, dict[str, object]] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for entry, found in zip(entries, pool.map(measure, entries, chunksize=4), strict=True):
            launch = launch_of(entry)
            config = launch.configs()[entry.number]
            case = entry.case
            row = rows.setdefault(
                entry._replace(capability=0),
                {"example": entry.example, "kernel": entry.kernel, "rank": case.rank,
                 "dtype": str(case.dtype).removeprefix("torch."), "factors": str(case.factors).removeprefix("torch."),
                 "variant": [name for name in VARIANTS if getattr(case, name)],
                 "config": {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages},
                 "needs": {}},
            )  # fmt: skip
            fits = found.shared <= SHARED_LIMIT[entry.capability]
            row["needs"][f"sm_{entry.capability}"] = {**dataclasses.asdict(found), "fits": fits}
            if entry.capability == 90:
                row["h100"] = predictions(entry, found)
    return list(rows.values())


def kind_of(row: dict[str, object]) -> tuple[object, ...]:
    """The kind of layer that a row is about."""
    return (row["rank"], row["dtype"], row["factors"], *row["variant"])


def markdown(rows: list[dict[str, object]], capabilities: list[int]) -> str:
    """A line for each kernel, configuration and kind of layer; bytes and times are those of one layer, see its head."""
    head = ["kernel", "rank", "configuration", *(f"sm_{capability}" for capability in capabilities)]
    head += ["bytes asked / ideal"] + [f"predicted us, {tokens:,} tokens" for tokens in TOKENS]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        config = " ".join(f"{value}" for value in row["config"].values())
        needs = []
        for capability in capabilities:
            found = row["needs"].get(f"sm_{capability}")
            if found is None:
                needs.append("not tried")
                continue
            text = f"{found['registers']}, {found['shared'] / 1024:.0f}"
            text += f", **stack {found['stack']}**" if found["stack"] else ""
            needs.append(text + ("" if found["fits"] else ", **too large**"))
        square = [found for found in row.get("h100", []) if found["layer"] in ("q, o", "model")]
        last = [f"{square[-1]['asked_bytes'] / square[-1]['ideal_bytes']:.2f}"] if square else ["-"]
        last += [f"{found['predicted_us']:.1f}" for found in square] or ["-"] * len(TOKENS)
        variant = " ".join([row["dtype"], row["factors"], *row["variant"]])
        name = row["example"] if variant == "bfloat16 float32" else f"{row['example']} ({variant})"
        lines.append(" | ".join([f"{name} `{row['kernel']}`", str(row["rank"]), config, *needs, *last]))
    return "\n".join(f"| {line} |" for line in lines)


EXPLANATION = """# What the Triton kernels need

Made by `python scripts/kernel_table.py` from compiled code; no GPU was asked. A cell for a kind of GPU: registers a
thread, and KiB of shared memory a program; bytes of stack a thread where there is any, which nothing should have at
ranks up to 64. Configurations: sizes of blocks, warps, stages. Bytes asked for by all programs against those that must
move, at {tokens:,} tokens; the rest comes from the L2 cache. Times are predictions for an H100 at 4096 x 4096, by the
formula in scripts/kernel_table.py; all layers are in kernel_table.json. bf16 with factors in fp32 if nothing else is
said. A check and a norm are those of a layer whose A and B have changed; "of all" means all linear layers of a
Llama-8B, for which bytes and times are those of the model. Triton {triton}.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every dtype and variant, not bf16 alone")
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES)
    parser.add_argument("--examples", nargs="+", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--processes", type=positive, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="keep the stored rows of other examples")
    parser.add_argument("--markdown", action="store_true", help="print the table, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    rows = collect(options)
    machine = describe_machine(torch.device("cpu"))
    machine["versions"]["triton"] = triton.__version__
    if options.keep:
        stored = json.loads((options.results / "kernel_table.json").read_text(encoding="utf-8"))
        kept = [row for row in stored["kernels"] if row["example"] not in options.examples]
        # sorted by kind of layer, then by example, as they are collected
        kinds = list(dict.fromkeys(kind_of(row) for row in stored["kernels"] + rows))
        places = list(EXAMPLES)
        rows = sorted(kept + rows, key=lambda row: (kinds.index(kind_of(row)), places.index(row["example"])))
        # each row is of one of these
        commits = [*stored.get("kept", {"commits": []})["commits"], stored["commit"]]
        machine["kept"] = {"commits": commits, "examples": sorted({row["example"] for row in kept})}
    text = markdown(rows, options.capabilities)
    if options.markdown:
        print(text)
    with replacing(options.results / "kernel_table.json") as temporary:
        # a row a line
        head = json.dumps({**machine, "kernels": []}, indent=2).removesuffix("[]\n}")
        temporary.write_text(head + "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]}\n", encoding="utf-8")
    explanation = EXPLANATION.format(tokens=TOKENS[-1], triton=triton.__version__)
    with replacing(options.results / "kernel_table.md") as temporary:
        temporary.write_text(explanation + text + "\n", encoding="utf-8")
    print(f"{len(rows)} rows; wrote kernel_table.json and kernel_table.md to {options.results}")


if __name__ == "__main__":
    main()
