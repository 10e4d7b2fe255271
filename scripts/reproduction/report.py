"""REPRODUCTION.md from the result files: claim, the paper's figure, ours, and the verdict of verdicts.py.

Called by `scripts/reproduce.py report`. The rule of each claim stands beside it in the page. A claim without results
says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import replacing
from reproduction.common import RESULTS, Options
from reproduction.memory_figure import METHODS, SHRUNK
from reproduction.verdicts import NAMES, OPEN, ROWS, Content, describe_correlation

SIZES = ("full", "laptop")


def detail_memory(content: Content) -> list[str]:
    lines = [
        "",
        "The paper states no length of its sequences: LLaMA's 256 tokens are the cutoff of its script, which short "
        "records stay below, and the shorter they are, the larger is the share that detaching saves: one dense copy of "
        "W0 + s B A for each adapted module, whatever the batch.",
    ]
    if content["size"] != "full":
        lines += [
            "",
            "Both models are shrunk so that the parts of the memory keep their shares: LLaMA's widths, layers and "
            "tokens by 8 and its vocabulary by 64, VL-BART's widths, batch and vocabulary by 8. Memory is counted, not "
            "measured by an allocator: the exact bytes of weights, gradients, AdamW's moments and what is kept for "
            "the backward pass. What is said of the real model is computed from its shapes.",
        ]
    unit, size = ("GB", 1e9 / 2**20) if content["size"] == "full" else ("MiB", 1.0)
    for name, title in (("llama", "LLaMA-7B"), ("vl_bart", "VL-BART")):
        found = content["summary"][name]
        values = found["total_mib"][found["setting"]]
        shrunk = "" if content["size"] == "full" else f" shrunk {SHRUNK[name]}-fold"
        heading = f"{title}{shrunk}, batch x length {found['setting']}: training memory, with the paper's dropout"
        lines += ["", heading, ""]
        lines += table(
            ["", unit, "to LoRA"],
            [
                [
                    METHODS[m].replace("\n", " "),
                    f"{v / size:,.1f}",
                    f"{v / values['lora']:.2f}" if "lora" in values else "-",
                ]
                for m, v in values.items()
            ],
        )
        lines += ["", f"{title}: what detaching saves on the dense algorithm", ""]
        predicted = found["predicted_percent_by_setting"]
        rows = [
            [setting, f"{v:.1f} %", f"{predicted[setting]:.1f} %"]
            for setting, v in found["saving_percent_by_setting"].items()
        ]
        lines += table(["batch x length", "measured", "MiB predicted from shapes, in % of the measured total"], rows)
    return lines


def detail_detach(content: Content) -> list[str]:
    """As Table 7 of the paper: accuracy and memory, with and without detaching."""
    summary = content["summary"]
    rows = [[METHODS[m].replace("\n", " "), f"{mib:,.1f}"] for m, mib in summary["total_mib"].items()]
    return [
        "", *accuracy_table(content), "", f"Memory of training, {summary['memory_of']}:", "",
        *table(["", "MiB"], rows),
    ]  # fmt: skip


def detail_pattern(content: Content) -> list[str]:
    summary = content["summary"]
    rows = [
        [name, NAMES[m], describe_correlation(c), describe_correlation(summary["at_the_last_step"][name][m]),
         f"{summary['paper'][m]:+.2f}"]
        for name, by_method in summary["correlations"].items() for m, c in by_method.items()
    ]  # fmt: skip
    steps, every = content["settings"]["steps"], content["settings"]["every"]
    note = (
        f"SmolLM2-135M, {steps} optimizer steps, a record every {every}. The intervals are over modules; how far other "
        "seeds or tasks would change the correlations is not in them. Recording took at most "
        f"{100 * summary['share_of_recording']:.1f} % of the time of a training."
    )
    return ["", note, "", *table(["modules", "method", "r over all checkpoints", "r at the last one", "paper"], rows)]


def detail_accuracy(content: Content) -> list[str]:
    base = content["summary"]["base"]
    lines = ["", *accuracy_table(content)]
    if base:
        before = ", ".join(f"{task} {100 * a:.1f} %" for task, a in base.items())
        right = "An answer is right when all its tokens are, the end of the sequence included."
        lines += ["", f"Before training: {before}. {right}"]
    return lines


def accuracy_table(content: Content) -> list[str]:
    rows = [
        [c["task"], NAMES[c["method"]], str(c["rank"] or "-"), describe_rate(c),
         describe_accuracy(c), f"{c['test_loss']:.3f}" if "test_loss" in c else "-"]
        for c in content["summary"]["cases"].values()
    ]  # fmt: skip
    lines = table(["task", "method", "rank", "rate", "accuracy", "test loss"], rows)
    tried: dict[str, list[str]] = {}
    for c in content["summary"]["cases"].values():
        for rate in c.get("validation_loss_by_rate", ()):
            if rate not in (found := tried.setdefault(f"{c['task']} {'full' if not c['rank'] else 'adapters'}", [])):
                found.append(rate)
    if tried:
        rates = "; ".join(f"{name} {', '.join(sorted(found, key=float))}" for name, found in tried.items())
        lines += ["", f"Rates tried for each method and rank: {rates}."]
        if any(len(found) > 1 for found in tried.values()):
            lines[-1] += (
                " The two with the lowest validation loss at the first seed were tried with all seeds, and the one "
                "with the lower mean was chosen."
            )
    return [*lines, "", SPREAD]


def describe_accuracy(case: Mapping[str, Any]) -> str:
    return f"{100 * case['mean']:.1f} +- {100 * case['spread']:.1f} %"


def describe_rate(case: Mapping[str, Any]) -> str:
    if "rate" not in case:
        return "-"
    return f"{case['rate']:g}{', edge of the grid' if case.get('edge') else ''}"


def detail_vl_bart(content: Content) -> list[str]:
    summary = content["summary"]
    rows = [
        [
            NAMES[m],
            describe_rate(e),
            describe_accuracy(e),
            f"{100 * e['swapped']:.1f} %",
        ]
        for m, e in summary["methods"].items()
    ]
    note = (
        f"{summary['num_test']} test questions; the question alone gives {100 * summary['question_only']:.1f} %, the "
        f"backbone before it is adapted {100 * summary['before']:.1f} %."
    )
    settings = content["settings"]
    if settings["dataset"] == "easy_vqa":
        note += (
            f" All of them fit `{settings['pattern']}`. The backbone learnt the other kinds of questions, but for "
            "those answered by yes or no: they are left out. The features are silhouettes and colours, made by hand "
            "in the place of a trained detector's. The number of steps was chosen in trials on the same questions, so "
            "that the methods differ; each rate by the validation loss of the first seed. All runs adapt one backbone, "
            "which comes out otherwise with another number of threads; how far the differences would follow is not in "
            "the intervals."
        )
    head = ["method", "rate", "accuracy", "with another question's picture"]
    return ["", note, "", *table(head, rows), "", SPREAD]


SPREAD = (
    "Accuracies are means over seeds +- their standard deviation. Intervals are over seeds; that the test records are "
    "a sample is not in them."
)
DETAILS = {
    "memory": detail_memory, "detach": detail_detach, "pattern": detail_pattern, "accuracy": detail_accuracy,
    "vl_bart": detail_vl_bart, "vl_bart_video": detail_vl_bart,
}  # fmt: skip
VIDEO = "vl_bart --size full --config configs/vl_bart_video.yaml"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def load(results: Path, size: str) -> dict[str, Content]:
    """The contents of the finished result files of one size, by claim."""
    found = {}
    for claim in DETAILS:
        path = Options(results=results, size=size).path(claim)
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "summary" in content:
            if "seeds" not in content:
                raise ValueError(f"{path}: written by an older version. Run `{content['command']}` again.")
            found[claim] = content
    return found


def run(options: Options) -> None:
    """Write REPRODUCTION.md beside the repository's results, or into another folder of them."""
    folder = RESULTS.parent if options.results.resolve() == RESULTS.resolve() else options.results
    path = folder / "REPRODUCTION.md"
    with replacing(path) as temporary:
        temporary.write_text(page(options.results), encoding="utf-8")
    print(f"wrote {path}")


def verdicts(results: Path) -> list[str]:
    """The table of claims, a line for each size that was measured."""
    by_size, rows = {size: load(results, size) for size in SIZES}, []
    for row in ROWS:
        measured = [size for size in SIZES if row.claim in by_size[size]]
        for size in measured:
            figure, verdict = row.judge(by_size[size])
            rows.append([row.title, row.paper, f"{figure} ({size} size)", f"**{verdict}**"])
        if not measured:
            rows.append([row.title, row.paper, "-", f"**{OPEN}**"])
    return table(["Claim", "Paper", "Found here", "Verdict"], rows)


def page(results: Path) -> str:
    """The whole page."""
    by_size, sections = {size: load(results, size) for size in SIZES}, []
    prefix = "results/" if results.resolve() == RESULTS.resolve() else ""
    for claim in DETAILS:
        rules = [row for row in ROWS if row.claim == claim]
        sections += ["", f"## {'; '.join(row.title for row in rules)}", ""]
        if len({row.rule for row in rules}) == 1:
            sections.append(f"- Verdict: {rules[0].rule}.")
        else:
            sections += [f"- Verdict, {row.title}: {row.rule}." for row in rules]
        for size in SIZES:
            content = by_size[size].get(claim)
            if content is not None:
                sections += describe_run(content, size)
                sections += DETAILS[claim](content)
                sections += ["", *(f"![{p.stem}]({prefix}{p.name})\n" for p in pictures(results, claim, size))]
        if not any(claim in contents for contents in by_size.values()):
            arguments = VIDEO if claim == "vl_bart_video" else claim
            sections += [f"- Not measured yet: `python scripts/reproduce.py {arguments}`."]
    lines = [
        "# The paper, reproduced",
        "",
        "The claims of [DoRA](https://arxiv.org/abs/2402.09353), measured again. This page is written by "
        "`python scripts/reproduce.py report` from the files in `results/`; every verdict follows from its figures by "
        "the rule that stands with the claim below. `laptop` size is made for 2 CPU cores, `full` for a GPU of 80 GB. "
        "Brackets hold 95 % intervals.",
        "",
        *verdicts(results),
    ]
    return "\n".join([*lines, *sections]).rstrip() + "\n"


def pictures(results: Path, claim: str, size: str) -> list[Path]:
    return sorted(p for p in results.glob(f"{claim}_{size}*.png") if "_dry" not in p.stem)


def describe_run(content: Content, size: str) -> list[str]:
    """Command, seeds, dtype, time and hardware of a result file."""
    seconds = sum(run["seconds"] for run in content["runs"].values())
    facts = [f"`{content['command']}`", content["settings"].get("dtype", "torch.float32").removeprefix("torch.")]
    if seeds := len(content["seeds"]):
        facts.insert(1, count(seeds, "seed"))
    facts.append(f"{count(round(seconds / 60), 'minute')} for all runs together")
    return [f"- {size} size: {', '.join(facts)}", *(f"- {hardware(machine)}" for machine in content["machines"])]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def hardware(machine: Mapping[str, Any]) -> str:
    cpu = f"{machine['processor']}, threads: {machine['threads']}"
    device = cpu if "CPU" in machine["device"] else machine["device"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    changed = " with changes" if machine["modified"] else ""
    return f"{device}; {versions}; commit {(machine['commit'] or 'unknown')[:9]}{changed}"
