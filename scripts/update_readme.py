"""Write the README's tables, and pages beside the results, from the stored result files.

    python scripts/update_readme.py           # rewrites README.md, and gpu.md and price.md beside the results
    python scripts/update_readme.py --check   # exits with 1 and names them if they are not what the results say

Expected result: the text between `<!-- table: memory -->` and `<!-- end: memory -->` holds one table per file in
`scripts/benchmarks/results/` that `scripts/benchmark_memory.py --json` wrote, and the text between
`<!-- table: benchmark -->` and `<!-- end: benchmark -->` one line per result of `scripts/benchmark.py`, with device and
versions. Between `<!-- table: price -->` and `<!-- end: price -->` is what `scripts/benchmark_price.py` found in
short; each of its shapes has a line in `scripts/benchmarks/results/price.md`. Between `<!-- table: check -->` and
`<!-- end: check -->` stands what `scripts/benchmark_check.py` measured. Results that are not there are left out. What
`scripts/gpu.sh` measures stands in `scripts/benchmarks/results/gpu.md`, "not measured yet" where its result is not
there; between `<!-- table: gpu -->` and `<!-- end: gpu -->` is one line on how much of it there is. Between
`<!-- table: reproduction -->` and `<!-- end: reproduction -->` are the verdicts of `scripts/reproduce.py report`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import price_page
from reproduction.common import RESULTS as REPRODUCTION
from reproduction.report import verdicts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "benchmarks" / "results"


NAMES = {
    "lora": "PEFT LoRA",
    "peft_dora": "PEFT `use_dora`",
    "dora": "dora_peft",
    "dora_not_detached": "dora_peft, `detach_norm=False`",
}
COLUMNS = {
    "trainable_parameters": ("trainable", "{:,.0f}"),
    "saved_mib": ("saved for backward, MiB", "{:,.0f}"),
    "peak_mib": ("peak, MiB", "{:,.0f}"),
    "time_s": ("s/step", "{:.2f}"),
}


def memory_table(result: dict[str, Any]) -> str:
    """One Markdown table from one result of benchmark_memory.py; ratios to LoRA in brackets."""
    config, methods = result["config"], result["methods"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"{Path(config['model_name_or_path']).name}, r={config['r']}, dropout {config['lora_dropout']}, batch "
        f"{config['per_device_train_batch_size']}, {config['dtype']}, on {result['device']} ({versions}, commit "
        f"{(result['commit'] or 'unknown')[:9]}), medians of {result['steps']} steps:",
        "",
        "| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, figures in methods.items():
        cells = []
        for key, (_, template) in COLUMNS.items():
            ratio = figures[key] / methods["lora"][key]
            cells.append(template.format(figures[key]) + (f" ({ratio:.2f})" if key != "trainable_parameters" else ""))
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Columns of the benchmark's table after LoRA's own figure, as ratios to it.
CONTENDERS = {"frozen": "frozen base", "lora_floor": "LoRA floor", "peft_dora": "PEFT `use_dora`", "dora": "dora_peft"}
# What a line is about, its quantity in a result, and LoRA's unit, in the order of the table.
CLAIMS = (
    ("step", "time_ms", "training step", " ms"),
    ("eval", "time_ms", "evaluation", " ms"),
    ("decode", "time_ms", "decoding", " ms/token"),
    ("memory", "saved_mib", "kept for backward", " MiB"),
    ("memory", "peak_mib", "peak memory", " MiB"),
    ("refresh", "norms_per_step", "norms per layer and optimizer step", ""),
)


def benchmark_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables from results of benchmark.py, one per machine, a line for each of the `CLAIMS`."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
        place = f"{report['device']} ({report['processor']}), {threads} ({versions}"
        machines.setdefault(place, []).append(report)
    tables = []
    for place, found in machines.items():
        lines = [line for claim in CLAIMS for report in found for line in claim_lines(report, *claim)]
        commits = ", ".join(dict.fromkeys((report["commit"] or "unknown")[:9] for report in found))
        rounds = " or ".join(str(n) for n in sorted({report["options"]["rounds"] for report in found}))
        peaks = {
            len(result["contenders"]["lora"]["values"])
            for report in found
            for result in report["results"]
            if result["quantity"] == "peak_mib"
        }
        processes = (
            f", peaks over the loaded model of {' or '.join(map(str, sorted(peaks)))} processes" if peaks else ""
        )
        heading = (
            f"On {place}, commit {commits}). Times are medians of {rounds} interleaved rounds{processes}; all but the "
            "first column are ratios to LoRA:"
        )
        header = "| | PEFT LoRA | " + " | ".join(CONTENDERS.values()) + " |"
        if lines:
            tables.append("\n".join([heading, "", header, "|---|" + "---:|" * (1 + len(CONTENDERS)), *lines]))
    return "\n\n".join(tables)


def claim_lines(report: Mapping[str, Any], suite: str, quantity: str, title: str, unit: str) -> list[str]:
    """The lines of one file about one claim; compiled contenders get a line of their own, relative to compiled LoRA."""
    lines = []
    for result in report["results"]:
        if (report["options"]["suite"], result["quantity"]) != (suite, quantity):
            continue
        if quantity == "saved_mib" and result["setting"]["checkpointing"] != "none":
            # the layers' inputs and nothing of the layers: equal for all
            continue
        values = {name: found["values"] for name, found in result["contenders"].items()}
        setting = describe(report["options"], result["setting"])
        lines.append(benchmark_line(f"{title}: {setting}", values, unit))
        compiled = {name.removesuffix("_compiled"): v for name, v in values.items() if name.endswith("_compiled")}
        if "lora" in compiled:
            lines.append(benchmark_line(f"{title}, compiled: {setting}", compiled, unit))
    return lines


def benchmark_line(label: str, values: Mapping[str, Sequence[float]], unit: str) -> str:
    lora = values["lora"]
    median = statistics.median(lora)
    cells = [f"{median:,.0f}{unit}" if median >= 100 or median == 0 else f"{median:.3g}{unit}"]
    for name in CONTENDERS:
        if name not in values:
            cells.append("-")
        elif all(lora):
            cells.append(f"{statistics.median(a / b for a, b in zip(values[name], lora, strict=True)):.2f}")
        else:
            # LoRA has no norm: the count itself
            cells.append(f"{statistics.median(values[name]):.3g}")
    return f"| {label} | " + " | ".join(cells) + " |"


def describe(options: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """What a line was measured on; defaults (no accumulation, no checkpointing, fp32) go without saying."""
    layers = f"{options['layers']} layer{'s' if options['layers'] > 1 else ''}"
    parts = [f"{options['model']}, {layers}", f"r={setting['rank']}"]
    if "dropout" in setting:
        parts.append(f"dropout {setting['dropout']:g}")
    if "prompt" in setting:
        parts.append(f"{setting['new_tokens']} tokens after {setting['prompt']}")
    elif "seq_len" in setting:
        parts.append(f"{setting['batch']} x {setting['seq_len']} tokens")
    if setting.get("accumulation", 1) > 1:
        parts.append(f"{setting['accumulation']} micro-batches")
    if setting.get("checkpointing", "none") != "none":
        parts.append("checkpointing")
    if setting["dtype"] != "fp32":
        adapter = setting.get("adapter_dtype", setting["dtype"])
        parts.append(setting["dtype"] if adapter == setting["dtype"] else f"{setting['dtype']}, adapter {adapter}")
    return ", ".join(parts)


def check_table(report: Mapping[str, Any] | None) -> str:
    """One Markdown table from the result of benchmark_check.py, nothing if there is none."""
    if report is None:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    checks = " or ".join(str(n) for n in sorted({found["checks"] for found in report["check"]}))
    lines = [
        f"On {report['device']} ({report['processor']}), {threads} ({versions}, commit "
        f"{(report['commit'] or 'unknown')[:9]}), what the check of A, B, m and W0 by content takes in all layers: the "
        f"median of {checks} calls, as a share of the median step or token:",
        "",
        "| | step or token | check | us a layer | share | goal |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for found in report["check"]:
        goal = "-" if found["goal_percent"] is None else f"at most {found['goal_percent']:g} %"
        step, check = (found[key]["median"] for key in ("step_ms", "check_ms"))
        lines.append(
            f"| {found['part']}: {describe(found, found['setting'])} | {step:.3g} ms | {check:.2g} ms | "
            f"{found['us_per_layer']:.1f} | {found['percent']:.2f} % | {goal} |"
        )
    return "\n".join(lines)


def ratio(report: Mapping[str, Any], one: str, other: str, quantity: str = "time_ms", **setting: Any) -> str:
    """The median ratio of two contenders in the results with this setting, the largest if there are several."""
    found = [
        statistics.median(a / b for a, b in zip(values[one]["values"], values[other]["values"], strict=True))
        for result in report["results"]
        if result["quantity"] == quantity and setting.items() <= result["setting"].items()
        for values in [result["contenders"]]
        if one in values and other in values
    ]
    return f"{max(found):.2f}" if found else UNMEASURED


def seconds(report: Mapping[str, Any], *names: str) -> str:
    """Medians of these contenders' steps."""
    values = report["results"][0]["contenders"]
    medians = (statistics.median(values[name]["values"]) / 1000 for name in names if name in values)
    return " / ".join(f"{median:.2f} s" for median in medians)


def bandwidth(report: Mapping[str, Any]) -> str:
    rates = report["gb_per_s"]
    return f"{min(rate for name, rate in rates.items() if name != 'copy') / rates['copy']:.2f}"


def qdora(report: Mapping[str, Any]) -> str:
    ours, theirs = ({k: statistics.median(v) for k, v in report["qdora"][name].items()} for name in ("qdora", "qlora"))
    return " and ".join(f"{ours[key] / theirs[key]:.2f}" for key in ("time_ms", "peak_mib"))


UNMEASURED = "not measured yet"
# Where the GPU's table stands, as README links to it.
GPU_PAGE = "scripts/benchmarks/results/gpu.md"
BF16, DEFAULT = {"dtype": "bf16", "adapter_dtype": "bf16"}, {"dtype": "bf16", "adapter_dtype": "fp32"}
STEP = "step / PEFT LoRA, 2,048 tokens, r=16: "
# What a line is about, its goal, the file of its result, and how to read it.
GPU_LINES: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    (f"{STEP}3B shapes, all bf16", "0.97", "step_llama-3.2-3b_cuda_step_3b", lambda r: ratio(r, "dora", "lora")),
    (f"{STEP}8B shapes, all bf16", "0.97", "step_llama-3-8b_cuda_step_8b", lambda r: ratio(r, "dora", "lora")),
    (
        f"{STEP}3B shapes, adapters in fp32 (PEFT's default)",
        "0.85",
        "step_llama-3.2-3b_cuda_step_3b_default",
        lambda r: ratio(r, "dora", "lora"),
    ),
    (
        f"{STEP}8B shapes, adapters in fp32 (PEFT's default)",
        "0.85",
        "step_llama-3-8b_cuda_step_8b_default",
        lambda r: ratio(r, "dora", "lora"),
    ),
    (
        "step / compiled LoRA, 8 layers of 3B shapes",
        "1.00",
        "step_llama-3.2-3b_cuda_compiled",
        lambda r: ratio(r, "dora_compiled", "lora_compiled"),
    ),
    (
        "step / PEFT `use_dora`, 8B shapes, r=16",
        "0.60",
        "step_llama-3-8b_cuda_step_8b",
        lambda r: ratio(r, "dora", "peft_dora"),
    ),
    (
        "the same, 16 layers, r=384, 8 micro-batches, checkpointing",
        "0.40",
        "step_llama-3-8b_cuda_rank_384",
        lambda r: ratio(r, "dora", "peft_dora"),
    ),
    (
        "step of Qwen3-8B shapes, r=384, 8 x 4,096 tokens, checkpointing: ours / PEFT `use_dora`",
        "5.0 s / -",
        "step_qwen3-8b_cuda_qwen",
        lambda r: seconds(r, "dora", "peft_dora"),
    ),
    (
        "peak memory / LoRA, 3B shapes, checkpointing",
        "1.01",
        "memory_llama-3.2-3b_cuda_memory",
        lambda r: ratio(r, "dora", "lora", "peak_mib", checkpointing="non-reentrant"),
    ),
    (
        "peak memory / LoRA, 3B shapes, adapters in fp32",
        "1.00",
        "memory_llama-3.2-3b_cuda_memory",
        lambda r: ratio(r, "dora", "lora", "peak_mib", checkpointing="none", **DEFAULT),
    ),
    (
        "peak memory / LoRA, 3B shapes, all bf16",
        "1.10",
        "memory_llama-3.2-3b_cuda_memory",
        lambda r: ratio(r, "dora", "lora", "peak_mib", checkpointing="none", **BF16),
    ),
    ("evaluation / LoRA, 3B shapes", "1.00", "eval_llama-3.2-3b_cuda_eval", lambda r: ratio(r, "dora", "lora")),
    ("decoding / LoRA, 3B shapes", "1.00", "decode_llama-3.2-3b_cuda_decode", lambda r: ratio(r, "dora", "lora")),
    ("bytes per second of the composition kernels / a copy's", "0.85", "kernels_cuda", bandwidth),
    ("step and peak / QLoRA, 70B shapes in nf4, 2,048 tokens, checkpointing", "1.03 and 1.03", "qdora_cuda", qdora),
)


def gpu_places(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The GPUs that results of `GPU_LINES` come from, with versions and commits; empty without results."""
    places = []
    for name in (name for _, _, name, _ in GPU_LINES if name in reports):
        report = reports[name]
        versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
        places.append(f"{report['device']} ({versions}, commit {(report['commit'] or 'unknown')[:9]})")
    return "; ".join(dict.fromkeys(places))


def gpu_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One Markdown table from the results of scripts/gpu.sh, by the names of their files."""
    lines = [
        f"| {label} | {goal} | {read(reports[name]) if name in reports else UNMEASURED} |"
        for label, goal, name, read in GPU_LINES
    ]
    places = gpu_places(reports)
    heading = [f"On {places}:", ""] if places else []
    return "\n".join([*heading, "| bf16 base on a GPU | goal | |", "|---|---:|---:|", *lines])


def gpu_page(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page `GPU_PAGE`: the table, and where it comes from."""
    return (
        "# What a GPU takes\n\nMeasured by `bash scripts/gpu.sh`, written by `python scripts/update_readme.py`, and "
        f"set against the goals.\n\n{gpu_table(reports)}\n"
    )


def gpu_line(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """What README says of `GPU_PAGE`, in one line."""
    found = sum(name in reports for _, _, name, _ in GPU_LINES)
    said = f"{found} of {len(GPU_LINES)} figures on {gpu_places(reports)}" if found else UNMEASURED
    return f"GPU figures: {said} ([goals and figures]({GPU_PAGE}))."


def insert(readme: str, name: str, text: str) -> str:
    """`readme` with `text` between the two marks of the table `name`."""
    return re.sub(
        rf"(<!-- table: {name} -->\n).*?(<!-- end: {name} -->)",
        lambda m: m.group(1) + (f"{text}\n" if text else "") + m.group(2),
        readme,
        flags=re.DOTALL,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if one is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    results = list(reports.values())
    after = insert(before, "memory", "\n\n".join(memory_table(result) for result in results if "methods" in result))
    after = insert(
        after,
        "benchmark",
        benchmark_table([result for name, result in reports.items() if "options" in result and "_cuda" not in name]),
    )
    price = reports.get("price_cpu")
    after = insert(after, "price", price_page.price_table(price))
    after = insert(after, "check", check_table(reports.get("check_cpu")))
    after = insert(after, "gpu", gpu_line(reports))
    after = insert(after, "reproduction", "\n".join(verdicts(REPRODUCTION)))
    pages = {readme: after, RESULTS / Path(GPU_PAGE).name: gpu_page(reports)}
    pages[RESULTS / Path(price_page.PAGE).name] = price_page.price_page(price, reports.get("profile_cpu"))
    if arguments.check:
        stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path} is not what the results say: run python scripts/update_readme.py", file=sys.stderr)
        return int(bool(stale))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
