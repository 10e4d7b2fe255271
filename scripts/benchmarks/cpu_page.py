"""The page of what training, evaluation and memory cost on a CPU: results of scripts/benchmark*.py, beside PEFT's.

For scripts/update_readme.py, which imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = "scripts/benchmarks/results/cpu.md"
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


# Tokens of a step from which README's claim counts: below, a refresh of the norm weighs more, see price.md.
FEW_TOKENS = 200
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


def cpu_page(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page `PAGE`, from the results by the names of their files."""
    memory = "\n\n".join(memory_table(result) for result in reports.values() if "methods" in result)
    suites = [result for name, result in reports.items() if "options" in result and "_cuda" not in name]
    parts = [
        "# What dora_peft costs on a CPU, by suite",
        "Written by `python scripts/update_readme.py` from the files beside it. Ratios are to PEFT LoRA; `frozen base` "
        "is the base model without an adapter, `LoRA floor` its products and nothing else. Short batches, equal "
        "libraries and compiled steps are measured by several processes, see [price.md](price.md).",
        "## Fine-tuning, by `scripts/benchmark_memory.py`",
        memory,
        "## Suites of `scripts/benchmark.py`",
        benchmark_table(suites),
        "## The check of the norm, by `scripts/benchmark_check.py`",
        check_table(reports.get("check_cpu")),
    ]
    return "\n\n".join(part or "not measured yet" for part in parts) + "\n"


def spread(values: Sequence[float]) -> str:
    """The least and the most, with two digits."""
    return f"{min(values):.2f} to {max(values):.2f}"


def claim(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """README's first sentence about costs, of all results on a CPU that the pages show, but compiled steps; empty
    without results."""
    ours, theirs, kept = [], [], {"dora": list[float](), "peft_dora": list[float]()}
    for entry in reports.get("price_cpu", {}).get("settings", {}).values():
        setting, prices = entry["setting"], entry["prices"].get("default", {})
        if setting["batch"] * setting["seq_len"] >= FEW_TOKENS and "ours / LoRA" in prices:
            ours.append(prices["ours / LoRA"]["median"])
    for report in reports.values():
        suite = report.get("options", {}).get("suite") if report.get("device", "").endswith("CPU") else None
        for result in report.get("results", []) if suite in ("step", "memory") else []:
            found, setting = result["contenders"], result["setting"]
            if suite == "step" and setting["batch"] * setting["seq_len"] >= FEW_TOKENS:
                for name, ratios in (("dora", ours), ("peft_dora", theirs)):
                    ratios += [found[name]["ratio"]] if name in found else []
            if result["quantity"] == "saved_mib" and setting["checkpointing"] == "none":
                for name, ratios in kept.items():
                    ratios.append(found[name]["ratio"])
        methods = report.get("methods", {})
        for name, ratios in (("dora", ours), ("peft_dora", theirs)):
            ratios += [methods[name]["time_s"] / methods["lora"]["time_s"]] if name in methods else []
        for name, ratios in kept.items():
            ratios += [methods[name]["saved_mib"] / methods["lora"]["saved_mib"]] if name in methods else []
    if not ours or not theirs or not kept["dora"]:
        return ""
    return (
        f"A training step of {FEW_TOKENS} tokens or more takes {spread(ours)} of PEFT LoRA's time on a CPU and keeps "
        f"{spread(kept['dora'])} of its bytes for backward; PEFT's own `use_dora` takes {spread(theirs)} and keeps "
        f"{spread(kept['peft_dora'])}."
    )
