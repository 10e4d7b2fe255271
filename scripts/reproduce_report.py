"""REPRODUCTION.md from the result files: claim, the paper's figure, ours, and a verdict by a rule, never by hand.

Called by `scripts/reproduce.py report`. A verdict is "reproduced", "partly" or "not reproduced"; the rule of each claim
stands beside it in the page. A claim without results says "not measured yet".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_common import replacing
from reproduce_common import Options

SIZES = ("full", "laptop")
YES, PARTLY, NO, OPEN = "reproduced", "partly", "not reproduced", "not measured yet"
Content = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: what the paper says, and how to read and judge what we found."""

    claim: str
    title: str
    paper: str
    rule: str
    judge: Callable[[Content], tuple[str, str]]  # the file's content to our figure and the verdict


def judge_memory(name: str) -> Callable[[Content], tuple[str, str]]:
    def judge(content: Content) -> tuple[str, str]:
        found = content["summary"][name]
        saved, paper = found["saving_percent"]["reference"], found["paper_percent"]
        by_setting = ", ".join(f"{value:.1f} % at {key}" for key, value in found["saving_percent_by_setting"].items())
        figure = (
            f"dense algorithm {saved:.1f} % (predicted from shapes {found['predicted_percent']:.1f} %; by batch x "
            f"length: {by_setting}); ours {found['saving_percent']['dora']:.1f} %, which takes "
            f"{found['ours_to_lora']:.2f} of LoRA's memory"
        )
        values = found["saving_percent_by_setting"].values()
        if abs(saved - paper) <= 0.2 * paper:
            return figure, YES
        return figure, PARTLY if max(values) >= 0.8 * paper or saved >= 0.5 * paper else NO

    return judge


def judge_pattern(content: Content) -> tuple[str, str]:
    found, paper = content["summary"]["correlations"], content["summary"]["paper"]
    figure = "; ".join(
        f"{name}: " + ", ".join(f"{m} {c['r']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]" for m, c in by_method.items())
        for name, by_method in found.items()
    )
    queries = found["query projections"]
    certain = [queries[m]["low"] * queries[m]["high"] > 0 and queries[m]["r"] * paper[m] > 0 for m in paper]
    if all(certain):
        return figure, YES
    ordered = queries["lora"]["r"] > max(queries["dora"]["r"], queries["full"]["r"])
    return figure, PARTLY if any(certain) and ordered else NO


def judge_gain(content: Content) -> tuple[str, str]:
    gains = content["summary"]["gains"]
    figure = "; ".join(
        f"{task}: DoRA - LoRA {describe_gain(gain)} ({gain['count']} pairs)" for task, gain in gains.items()
    )
    cases = content["summary"]["cases"].values()
    full = [
        f"{case['task']} full fine-tuning {case['mean']:.1%} +- {case['spread']:.1%}"
        for case in cases
        if case["method"] == "full"
    ]
    figure = "; ".join([figure, *full])
    if all(gain["low"] > 0 for gain in gains.values()):
        return figure, YES
    return figure, PARTLY if all(gain["high"] > 0 for gain in gains.values()) else NO


def judge_low_rank(content: Content) -> tuple[str, str]:
    """Whether DoRA's gain at the lowest rank is positive and above that at the highest."""
    texts, verdicts = [], []
    for task in content["summary"]["gains"]:
        cases = {(c["method"], c["rank"]): c for c in content["summary"]["cases"].values() if c["task"] == task}
        ranks = sorted({rank for _, rank in cases if rank})
        gains = {rank: cases["dora", rank]["mean"] - cases["lora", rank]["mean"] for rank in ranks}
        texts.append(f"{task}: " + ", ".join(f"r={rank} {gain:+.1%}" for rank, gain in gains.items()))
        low, high = ranks[0], ranks[-1]
        spread = sum(cases[m, low]["spread"] ** 2 for m in ("lora", "dora")) ** 0.5
        certain = gains[low] > spread and gains[low] > gains[high]
        verdicts.append(YES if certain else PARTLY if gains[low] > max(0.0, gains[high]) else NO)
    worst = max(verdicts, key=[YES, PARTLY, NO].index)
    best = min(verdicts, key=[YES, PARTLY, NO].index)
    return "; ".join(texts), worst if worst == best else PARTLY


def judge_detach(content: Content) -> tuple[str, str]:
    summary = content["summary"]
    totals = summary["total_mib"]
    figure = "; ".join(f"{task}: detached - not {describe_gain(d)}" for task, d in summary["differences"].items())
    saving = {m: 1 - totals[m] / totals[f"{m}_not_detached"] for m in ("reference", "dora")}
    figure += f"; memory saved on the dense algorithm {saving['reference']:.1%}, on ours {saving['dora']:.1%}"
    # equal: the interval of the difference holds 0, or what is lost is below one point in a hundred
    equal = [d["low"] <= 0 <= d["high"] or abs(d["mean"]) < 0.01 for d in summary["differences"].values()]
    return figure, YES if all(equal) else PARTLY if any(equal) else NO


def judge_vl_bart(content: Content) -> tuple[str, str]:
    summary = content["summary"]
    methods = summary["methods"]
    figure = ", ".join(f"{name} {100 * m['mean']:.1f} +- {100 * m['spread']:.1f} %" for name, m in methods.items())
    figure += f"; question alone {100 * summary['question_only']:.1f} %"
    gain = methods["dora"]["mean"] - methods["lora"]["mean"]
    spread = (methods["dora"]["spread"] ** 2 + methods["lora"]["spread"] ** 2) ** 0.5
    if methods["dora"]["mean"] <= summary["question_only"]:
        return figure, NO
    return figure, YES if gain > spread else PARTLY if gain > -spread else NO


def describe_gain(gain: Mapping[str, float]) -> str:
    return f"{100 * gain['mean']:+.1f} points [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


MEMORY_RULE = (
    "reproduced: within a fifth of the paper's saving at its batch and length, on the dense algorithm; partly: at "
    "least half of it there, or four fifths of it elsewhere in the sweep"
)
ROWS = (
    Row(
        "memory", "Detaching the norm saves memory on LLaMA-7B", "24.4 % (37.3 to 28.2 GB)", MEMORY_RULE,
        judge_memory("llama"),
    ),
    Row(
        "memory", "Detaching the norm saves memory on VL-BART", "12.4 % (23.4 to 20.5 GB)", MEMORY_RULE,
        judge_memory("vl_bart"),
    ),
    Row(
        "detach", "Detaching the norm costs no accuracy", "78.3 to 78.1 (LLaMA-7B), 77.3 to 77.4 (VL-BART)",
        "reproduced: on every task the interval of the difference over the seeds holds 0, or less than a point is lost",
        judge_detach,
    ),
    Row(
        "pattern", "Magnitude and direction change as in full fine-tuning, unlike in LoRA",
        "correlation of dM with dD: full -0.62, LoRA +0.83, DoRA -0.31",
        "reproduced: all three intervals of the query projections lie on the paper's side of 0; partly: at least one "
        "does, and LoRA's correlation is the largest",
        judge_pattern,
    ),
    Row(
        "accuracy", "DoRA matches or beats LoRA", "LLaMA-7B 74.7 to 78.4, LLaMA3-8B 80.8 to 85.2",
        "reproduced: on every task the interval of DoRA's gain over ranks and seeds is above 0; partly: it holds 0 "
        "or is above",
        judge_gain,
    ),
    Row(
        "accuracy", "most clearly at low rank", "r=4: 39.5 to 61.9; r=64: 65.8 to 72.1 (LLaMA-7B)",
        "reproduced: the gain at the lowest rank is above the spread over seeds and above that at the highest rank; "
        "partly: above 0 and above that at the highest rank, or on one task only",
        judge_low_rank,
    ),
    Row(
        "vl_bart", "VL-BART, image questions: DoRA beats LoRA and equals full fine-tuning",
        "full 77.3, LoRA 76.5, DoRA 77.4 (average of four tasks)",
        "reproduced: DoRA's gain over LoRA is above the spread over seeds; partly: within it", judge_vl_bart,
    ),
)  # fmt: skip


def load(results: Path, claim: str) -> Content | None:
    """The content of a claim's finished result file, of the full size where there is one."""
    for size in SIZES:
        path = results / f"{claim}_{size}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if "summary" in content and not content["settings"]["dry_run"]:
                return content
    return None


def run(options: Options) -> None:
    """Write REPRODUCTION.md beside the folder of results."""
    path = options.results.parent / "REPRODUCTION.md"
    with replacing(path) as temporary:
        temporary.write_text(page(options.results), encoding="utf-8")
    print(f"wrote {path}")


def page(results: Path) -> str:
    """The whole page."""
    lines = [
        "# The paper, reproduced",
        "",
        "The claims of [DoRA](https://arxiv.org/abs/2402.09353), measured again. This page is written by "
        "`python scripts/reproduce.py report` from the files in `results/`; no verdict is typed by hand. Each command "
        "goes on where it was interrupted and takes under 20 minutes on 2 CPU cores; `--size full` is the paper's "
        "size, on a GPU.",
        "",
        "| Claim | Paper | Found here | Verdict |",
        "|---|---|---|---|",
    ]
    details = [
        "",
        "## Where each line comes from",
        "",
        "| Claim | Command | Hardware | Seeds | Rule of the verdict |",
        "|---|---|---|---|---|",
    ]
    figures = ["", "## Figures", ""]
    drawn: set[str] = set()
    for row in ROWS:
        content = load(results, row.claim)
        figure, verdict = (OPEN, OPEN) if content is None else row.judge(content)
        lines.append(f"| {row.title} | {row.paper} | {figure} | **{verdict}** |")
        size = "laptop" if content is None else content["size"]
        command = f"python scripts/reproduce.py {row.claim}" if content is None else content["command"]
        details.append(f"| {row.title} | `{command}` | {hardware(content)} | {seeds(content)} | {row.rule} |")
        if row.claim not in drawn:
            drawn.add(row.claim)
            for picture in sorted(results.glob(f"{row.claim}_{size}*.png")) if content is not None else []:
                figures.append(f"![{picture.stem}](results/{picture.name})\n")
    return "\n".join([*lines, *details, *figures]).rstrip() + "\n"


def hardware(content: Content | None) -> str:
    if content is None:
        return "-"
    machine = content["machine"]
    device = (
        f"{machine['processor']}, {machine['threads']} threads" if "CPU" in machine["device"] else machine["device"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{device}; {versions}; commit {(machine['commit'] or 'unknown')[:9]}"


def seeds(content: Content | None) -> str:
    if content is None:
        return "-"
    found = {run["seed"] for run in content["runs"].values() if "seed" in run}
    return str(len(found)) if found else "1"
