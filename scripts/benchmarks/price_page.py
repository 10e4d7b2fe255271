"""The page that says what a training step costs beside LoRA: the results of scripts/benchmark_price.py and their goals.

For scripts/update_readme.py, which imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PAGE = "scripts/benchmarks/results/price.md"
LIBRARIES = {"default": "out of the box", "torch": "oneDNN off", "same": "same library"}
OURS, COMPILED, EAGER = "ours / LoRA", "compiled ours / compiled LoRA", "compiled / eager ours"
# By the beginning of a setting's name and the price: the goals under each library.
GOALS = {
    ("llama-512-dropout", OURS): {"default": 1.0, "torch": 0.9, "same": 0.9},
    ("llama-512", OURS): {"default": 1.0, "torch": 0.98, "same": 0.98},
    ("drawn-", OURS): {"default": 1.0, "torch": 1.02},
    ("short", OURS): {"torch": 1.05},
    ("tiny-batch", OURS): {"torch": 1.15},
    ("compiled", COMPILED): {"default": 1.0, "torch": 1.0},
    ("compiled", EAGER): {"default": 0.98, "torch": 0.98},
}
# README's lines: label, settings by the beginning of their name, and price.
LINES = (
    ("4 x 256 tokens, width 512, r=16", "llama-512", OURS),
    ("the same with dropout 0.05", "llama-512-dropout", OURS),
    ("ten drawn shapes, 128 to 600 tokens", "drawn-", OURS),
    ("16 x 14 tokens, SmolLM2's shapes, r=16", "short", OURS),
    ("4 x 8 tokens, width 384, r=8", "tiny-batch", OURS),
    ("compiled, 4 x 256 tokens: / compiled LoRA", "compiled", COMPILED),
)


def goal(name: str, price: str, library: str) -> float | None:
    """What is aimed at, None for nothing."""
    for (beginning, priced), goals in GOALS.items():
        if price == priced and (name == beginning or (beginning.endswith("-") and name.startswith(beginning))):
            return goals.get(library)
    return None


def norm_share(setting: Mapping[str, Any]) -> float:
    """Multiplications of a norm's refresh, out x in x r once a step, over those of the base products, twice out x in
    for each token: what no exact DoRA does without."""
    return setting["rank"] / (2 * setting["batch"] * setting["seq_len"])


def place(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The machines, versions and commits that results come from."""
    machines = [entry["machine"] for entry in settings.values()]
    commits = ", ".join(dict.fromkeys((machine["commit"] or "unknown")[:9] for machine in machines))
    places = []
    for machine in machines:
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        sets = machine["instruction_sets"]
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        places.append(f"{machine['processor']} ({' '.join(sets['processor'])}), {threads} ({versions})")
    return f"{'; '.join(dict.fromkeys(places))}, commit {commits}"


def price_table(report: Mapping[str, Any] | None) -> str:
    """README's table: a line for each of `LINES`, the median and the range of its settings' ratios by library."""
    if report is None:
        return ""
    lines = []
    for label, beginning, price in LINES:
        found = [
            entry["prices"]
            for name, entry in report["settings"].items()
            if name == beginning or (beginning.endswith("-") and name.startswith(beginning))
        ]
        cells = [ratios([p[library][price] for p in found if price in p.get(library, {})]) for library in LIBRARIES]
        if found:
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    heading = f"A training step beside PEFT LoRA's, fp32, on {place(report['settings'])} ([all shapes]({PAGE})):"
    header = "| ours / LoRA | " + " | ".join(LIBRARIES.values()) + " |"
    return "\n".join([heading, "", header, "|---|" + "---:|" * len(LIBRARIES), *lines])


def ratios(found: Sequence[Mapping[str, float]]) -> str:
    """Median of some settings' medians, and the range of their processes; of several settings that of the medians."""
    if not found:
        return "-"
    medians = [one["median"] for one in found]
    least, most = (found[0]["least"], found[0]["most"]) if len(found) == 1 else (min(medians), max(medians))
    return f"{statistics.median(medians):.2f} ({least:.2f} to {most:.2f})"


def profile_table(name: str, found: Mapping[str, Any]) -> str:
    """Where a step's time goes, as scripts/profile_step.py found it."""
    lora, ours = found["ms"]["lora"], found["ms"]["dora"]
    rows = [(kind, lora[kind], ours[kind]) for kind in lora] + [("in all", sum(lora.values()), sum(ours.values()))]
    lines = [f"| {kind} | {a:.1f} | {b:.1f} | {b - a:+.1f} |" for kind, a, b in rows]
    heading = f"{name}, {LIBRARIES[found['library']]}, ms a step, mean of {found['steps']} (commit "
    heading += f"{(found['machine']['commit'] or 'unknown')[:9]}):"
    return "\n".join([heading, "", "| | PEFT LoRA | ours | |", "|---|---:|---:|---:|", *lines])


# What was measured beside it and not kept, so that nobody has to try it again; figures of the time, ours / LoRA.
TRIED = """## What was tried

Eager, 4 x 256 tokens, oneDNN off, interleaved in one process: c (W0 + s B A) composed in both passes (kept) 1.013 to
1.023; in the forward pass alone 1.030; never 1.040; never, with the norm from W0 A^T after the product, while W0 is in
the cache, 1.047 to 1.055. At 16 x 14, 4 x 8 and 2 x 64 tokens the last one is within 0.02 of what is kept. Four layouts
of the composed weight: equal within 2 %. weight_norm's fused backward pass for the magnitude: as fast as batch
normalisation's, and less exact. What bounds it is the table's *norm*, and beyond it copies of W0 and Python between
large products, by the profiles below.

Compiled, 4 x 256 tokens, oneDNN off, / compiled LoRA: the norm by an operator, which the compiler calls as Python,
1.08; the whole layer as one operator 1.05 and 1.08 in two runs; v and W0 + s B A in the graph (kept) see the table; the
magnitude's sum over tokens in stages of 8 rows: its kernels took 1.4 times as long. What bounds it: the norm, and one
more sum over the tokens of each layer, down the columns, 1 % of a step."""


def price_page(report: Mapping[str, Any] | None, profiles: Mapping[str, Any] | None = None) -> str:
    """The page `PAGE`: a line for each setting and price, and where the time goes in some of them."""
    lines = [
        "# What a training step costs on a CPU",
        "",
        "The median, and the range over processes, of each process's median ratio to PEFT LoRA in interleaved steps;",
        "measured by `python scripts/benchmark_price.py`, written by `python scripts/update_readme.py`. Out of the box",
        "is what a user gets: LoRA multiplies by torch's `F.linear`, ours by oneDNN where `dora_peft/ops/products.py`",
        "says so. With oneDNN off both multiply by `F.linear`; `same library` routes LoRA's and the base model's",
        "products through ours.",
        "",
        "*norm* is what a refresh of all norms multiplies, over what the base products do, r / (2 tokens): once a step",
        "an exact DoRA needs W0 A^T or B A of its new factors, for however few tokens, and LoRA does not. **Bold**:",
        "the goal in brackets is met.",
    ]
    if report is None:
        return "\n".join([*lines, "", "not measured yet", ""])
    header = f"| setting | tokens, width, rank, dropout | norm | price | {' | '.join(LIBRARIES.values())} |"
    lines += ["", f"On {place(report['settings'])}.", "", header, "|---|---|---:|---|" + "---:|" * len(LIBRARIES)]
    for name, entry in report["settings"].items():
        setting = entry["setting"]
        tokens = f"{setting['batch']} x {setting['seq_len']}, {setting['shape']['hidden']}, {setting['rank']}, "
        start = f"| {name} | {tokens}{setting['dropout']:g} | {100 * norm_share(setting):.1f} % |"
        for price in next(iter(entry["prices"].values())):
            cells = [cell(name, price, library, entry["prices"]) for library in LIBRARIES]
            lines.append(f"{start} {price} | {' | '.join(cells)} |")
    rounds = sorted({(entry["processes"], entry["rounds"]) for entry in report["settings"].values()})
    counts = " or ".join(f"{processes} processes x {steps} steps" for processes, steps in rounds)
    lines += ["", f"{counts}; the drawn shapes by seed {report['seed']}.", "", TRIED]
    if profiles is not None:
        lines += [
            "",
            "## Where the time goes",
            "",
            "By torch's profiler (`python scripts/profile_step.py`), whose own time is in it.",
        ]
        for name, found in profiles["profiles"].items():
            lines += ["", profile_table(name, found)]
    return "\n".join([*lines, ""])


def cell(name: str, price: str, library: str, prices: Mapping[str, Any]) -> str:
    """A median with its range and goal."""
    found = prices.get(library, {}).get(price)
    if found is None:
        return "-"
    text, wanted = f"{found['median']:.3f}", goal(name, price, library)
    if wanted is not None:
        text = f"**{text}**" if found["median"] <= wanted else text
        text += f" [{wanted:.2f}]"
    return f"{text} ({found['least']:.3f} to {found['most']:.3f})"
