"""Speed and memory of DoRA against PEFT's LoRA and `use_dora`, and against what no adapter could beat.

    python scripts/benchmark.py SUITE [--model llama-512] [--rank 16,128] [--dropout 0,0.05] [options]
    python scripts/benchmark.py all     # every run behind the README's table; 20 to 25 minutes on 2 cores, resumable

On a laptop without GPU, in seconds:

    python scripts/benchmark.py step --model tiny

Suites: `step` (whole training step), `layer` (forward, backward and both of one linear layer), `eval`, `decode`
(single tokens behind a KV cache), `refresh` (the norm alone, its error, how often it is computed), `memory` (bytes
kept for backward; peak of the allocator on a GPU, of the resident set in a process per contender on a CPU).

Contenders: `lora`, `peft_dora` (LoraConfig(use_dora=True)), `dora` and `dora:IMPLEMENTATION` (this package), `frozen`
(the base model alone, dx included), `lora_floor` (base and low-rank products, nothing else), in inference also
`peft_dora_cached` (under peft.helpers.DoraCaching), and with --compile `lora_compiled` and `dora_compiled`.

All contenders share one random base model of the true widths and have equal adapters. Without dropout, their losses,
outputs and gradients are compared before anything is timed; an unequal one ends the run with its name. Then they run
in turn, in an order shuffled every round. With dropout, PEFT's DoRA drops its base product too, ours only the branch.

Expected result: a table of medians, [quartiles] and ratios to `lora` within each round; the same with raw values,
device and versions as scripts/benchmarks/results/SUITE_MODEL_DEVICE[_TAG].json; and bars of the ratios beside it.
`python scripts/update_readme.py` writes the README's table from these files.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, DTYPES, SHAPES
from benchmarks.footprint import measure_worker
from benchmarks.suites import SUITES
from common.memory import describe_machine, positive, replacing, write_json

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results"
CHECKPOINTING = ("none", "reentrant", "non-reentrant")
ALWAYS = ["lora", "peft_dora"]  # the unit of all ratios, and what the other DoRAs have to equal
DEFAULT = [*ALWAYS, "dora", "dora:torch", "dora:reference", "dora:triton", "frozen", "lora_floor"]
CPU_VOCABULARY = 2048  # the output layer, which no adapter touches, would outweigh a few cut layers on a CPU
# What a stored result is not distinguished by.
NOT_OPTIONS = ("json", "results", "resume", "worker", "force")
QUANTITIES = {
    "time_ms": "time, ms",
    "saved_mib": "kept for backward, MiB",
    "peak_mib": "peak over the loaded model, MiB",
    "refresh_ms": "one norm, ms",
    "norm_error": "largest relative error of a norm",
    "norms_per_step": "norms per layer and optimizer step",
}
MAIN = "--contenders dora,frozen,lora_floor"
# The runs of `all`: enough layers for a step to be made of what a deep model's is made of, few enough for 25 minutes.
PLAN = (
    f"step --model llama-512 --rank 16,128 --dropout 0,0.05 {MAIN},dora:reference",
    f"step --model smollm2-135m --layers 3 --rank 16,128 --dropout 0,0.05 {MAIN}",
    f"step --model smollm2-135m --layers 3 --batch 16 --seq-len 14 --tag short {MAIN}",
    f"step --model llama-1024 --layers 2 --batch 2 --rank 16,128 --dropout 0,0.05 {MAIN}",
    f"step --model llama-3.2-1b --layers 1 --batch 1 --rank 16 --dropout 0,0.05 {MAIN}",
    f"step --model llama-512 --batch 1 --accumulation 4 --checkpointing none,non-reentrant --tag accumulation {MAIN}",
    "step --model llama-512 --layers 2 --compile --tag compiled --contenders dora",
    f"eval --model llama-512 {MAIN},peft_dora_cached",
    f"eval --model llama-1024 --layers 2 --batch 2 {MAIN},peft_dora_cached",
    f"decode --model llama-512 {MAIN},peft_dora_cached",
    f"decode --model llama-1024 --layers 2 {MAIN},peft_dora_cached",
    f"memory --model llama-512 --batch 2 {MAIN}",
    "refresh --model llama-1024 --layers 2",
    "refresh --model llama-1024 --layers 2 --dtype bf16 --tag bf16",
)


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values separated by commas."""

    def read(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",")]

    return read


def contender(text: str) -> str:
    if text not in CONTENDERS:
        raise argparse.ArgumentTypeError(f"unknown contender {text!r}, expected some of {','.join(CONTENDERS)}")
    return text


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a dropout probability from 0 to below 1, found {text!r}")
    return value


def checkpointing(text: str) -> str:
    if text not in CHECKPOINTING:
        raise argparse.ArgumentTypeError(f"unknown checkpointing {text!r}, expected some of {','.join(CHECKPOINTING)}")
    return text


def layer_shape(text: str) -> tuple[int, int]:
    inputs, separator, outputs = text.partition("x")
    if not (separator and inputs.isdigit() and outputs.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a layer's shape as INxOUT, such as 1024x4096, found {text!r}")
    return int(inputs), int(outputs)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line and fill in what depends on the suite and the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--model", choices=SHAPES, default="llama-512", help="widths of the model (llama-512)")
    parser.add_argument("--layers", type=positive, help="decoder layers (the model's own number)")
    parser.add_argument("--vocab", type=positive, help=f"vocabulary (the model's; at most {CPU_VOCABULARY} on a CPU)")
    parser.add_argument("--shapes", type=listed(layer_shape), help="suites layer, refresh: INxOUT,... (the model's)")
    parser.add_argument("--contenders", type=listed(contender), help="besides lora and peft_dora (all that fit)")
    parser.add_argument("--compile", action="store_true", help="add lora_compiled and dora_compiled")
    parser.add_argument("--rank", type=listed(positive), default=[16], help="ranks (16)")
    parser.add_argument("--dropout", type=listed(probability), default=[0.0], help="dropouts (0)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base model; `memory` takes both (fp32)")
    parser.add_argument("--adapter-dtype", choices=DTYPES, default="fp32", help="bf16 over a bf16 base only (fp32)")
    parser.add_argument("--checkpointing", type=listed(checkpointing), help=f"some of {','.join(CHECKPOINTING)} (none)")
    parser.add_argument("--batch", type=positive, help="sequences per micro-batch (4; decode 1)")
    parser.add_argument("--seq-len", type=positive, help="tokens per sequence, decode: of the prompt (256; decode 64)")
    parser.add_argument("--accumulation", type=positive, default=1, help="micro-batches per optimizer step (1)")
    parser.add_argument("--new-tokens", type=positive, default=16, help="suite decode: tokens behind the prompt (16)")
    parser.add_argument("--rounds", type=positive, default=9, help="timed rounds (9)")
    parser.add_argument("--warmup", type=positive, default=2, help="rounds before them (2)")
    parser.add_argument("--repeats", type=positive, default=5, help="suite memory: processes per contender (5)")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="suite memory: without peak memory")
    parser.add_argument("--threads", type=positive, help="of torch on the CPU (torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--tag", default="", help="end of the file's name, for variants of a run")
    parser.add_argument("--json", type=Path, help="where to write instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--force", action="store_true", help="`all`: repeat runs whose result is there already")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.adapter_dtype == "bf16" and options.dtype != "bf16":
        parser.error("--adapter-dtype bf16 needs --dtype bf16: PEFT keeps an adapter in bf16 over a bf16 base only")

    shape, decode = SHAPES[options.model], options.suite == "decode"
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.layers is None:
        options.layers = shape.layers
    if options.vocab is None:
        options.vocab = min(shape.vocab, CPU_VOCABULARY) if options.device.type == "cpu" else shape.vocab
    if options.batch is None:
        options.batch = 1 if decode else 4
    if options.seq_len is None:
        options.seq_len = 64 if decode else 256
    if options.checkpointing is None:
        options.checkpointing = ["none", "non-reentrant"] if options.suite == "memory" else ["none"]
    if options.contenders is None:
        options.contenders = ["dora"] if options.suite == "refresh" else list(DEFAULT)
        options.contenders += ["peft_dora_cached"] if options.suite in ("eval", "decode") else []
    options.contenders += ["lora_compiled", "dora_compiled"] if options.compile else []
    options.contenders = [name for name in CONTENDERS if name in {*ALWAYS, *options.contenders}]
    return options


def result_path(options: argparse.Namespace) -> Path:
    """Where a run is stored: SUITE_MODEL_DEVICE[_TAG].json, with the shapes for MODEL where they were given."""
    model = options.model
    if options.shapes is not None:
        model = "+".join(f"{inputs}x{outputs}" for inputs, outputs in options.shapes)
    parts = [options.suite, model, options.device.type, options.tag]
    return options.json or options.results / ("_".join(filter(None, parts)) + ".json")


def stored_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they are in the JSON file, read back from JSON so that they compare equal."""
    kept = {name: value for name, value in vars(options).items() if name not in NOT_OPTIONS}
    return json.loads(json.dumps(kept | {"device": str(options.device)}))


def is_stored(path: Path, options: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
    """Whether `path` holds a run of these options by this commit, with no change to the package beside it."""
    if not path.exists():
        return False
    report = json.loads(path.read_text(encoding="utf-8"))
    known = machine["commit"] is not None and not machine["modified"] and not report["modified"]
    return known and (report["options"], report["commit"]) == (options, machine["commit"])


def format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def describe(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def format_result(result: Mapping[str, Any]) -> str:
    """One line a contender: median [quartiles] and, where there is a reference, ratio [quartiles] to it."""
    rows = [["", QUANTITIES[result["quantity"]], "", f"to {result['reference']}", ""]]
    for name, found in result["contenders"].items():
        row = [name, format_value(found["median"]), f"[{format_value(found['q1'])}, {format_value(found['q3'])}]"]
        if "ratio" in found:
            row += [f"{found['ratio']:.3f}", f"[{found['ratio_q1']:.3f}, {found['ratio_q3']:.3f}]"]
        rows.append(row + [""] * (5 - len(row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([describe(result["setting"]), *lines])


def color(name: str) -> str:
    kind = CONTENDERS[name][0]
    return {"lora": "tab:gray", "peft_dora": "tab:orange", "dora": "tab:blue"}.get(kind, "lightgray")


def draw_ratios(report: Mapping[str, Any], path: Path) -> None:
    """Bars of the ratios to the reference with whiskers from quartile to quartile, one panel a setting."""
    from matplotlib.figure import Figure

    results = [r for r in report["results"] if any("ratio" in found for found in r["contenders"].values())]
    if not results:
        return
    settings = [r["setting"] for r in results]
    shared = {key: value for key, value in settings[0].items() if all(s.get(key) == value for s in settings)}
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    bars_per_panel = max(len(r["contenders"]) for r in results)
    size = (4.6 * columns, rows * (0.9 + 0.32 * bars_per_panel) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    heading = f"{report['options']['suite']}, {report['options']['model']}, {report['options']['layers']} layers"
    common = textwrap.fill(describe(shared), 60 * columns)
    figure.suptitle(f"{heading}, {report['processor']}\n{common}", fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, result in zip(panels, results, strict=False):
        found = {name: values for name, values in result["contenders"].items() if "ratio" in values}
        ratios = [values["ratio"] for values in found.values()]
        spread = [
            [values["ratio"] - values["ratio_q1"] for values in found.values()],
            [values["ratio_q3"] - values["ratio"] for values in found.values()],
        ]
        bars = axes.barh(list(found), ratios, xerr=spread, color=[color(name) for name in found], ecolor="black")
        labels = axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=4, fontsize=8, zorder=3)
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(f"{QUANTITIES[result['quantity']].rpartition(', ')[0] or 'error'} / {result['reference']}'s")
        axes.xaxis.label.set_size(8)
        own = {key: value for key, value in result["setting"].items() if key not in shared}
        axes.set_title(describe(own), fontsize=8)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def run(options: argparse.Namespace) -> None:
    """Run one suite, print its tables, write its JSON and its plot."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path, machine, stored = result_path(options), describe_machine(options.device), stored_options(options)
    if options.resume and is_stored(path, stored, machine):
        print(f"{path} is there already; --force repeats it")
        return
    if options.shapes is None:
        options.shapes = SHAPES[options.model].linears()
    report: dict[str, Any] = {**machine, "options": stored, "skipped": {}, "results": []}
    for result in SUITES[options.suite](options, report["skipped"]):
        report["results"].append(result)
        print(f"\n{options.suite}, {options.model}: {format_result(result)}", flush=True)
    write_json(path, report)
    draw_ratios(report, path.with_suffix(".png"))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    state = f"{machine['commit'] or 'unknown'}{', modified' if machine['modified'] else ''}"
    print(f"\n{machine['device']} ({machine['processor']}), threads {machine['threads']}; {versions}; commit {state}")
    print(f"medians of {options.rounds} interleaved rounds; wrote {path}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = read_options(argv)
    if options.suite == "all":
        rest = [word for word in argv if word not in ("all", "--force")]
        for number, planned in enumerate(PLAN, 1):
            print(f"\n[{number}/{len(PLAN)}] {planned}", flush=True)
            # Options given beside `all` come last and so win over the plan's.
            run(read_options([*planned.split(), *rest, *([] if options.force else ["--resume"])]))
    elif options.worker is not None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        write_json(options.json, measure_worker(options))
    else:
        run(options)


if __name__ == "__main__":
    main()
