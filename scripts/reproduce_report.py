"""REPRODUCTION.md from the result files: claim, the paper's figure, ours, and a verdict by a rule, never by hand.

Called by `scripts/reproduce.py report`. A verdict is "reproduced", "partly" or "not reproduced"; the rule of each claim
stands beside it in the page. A claim without results, or with too few of them to judge, says so instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_common import replacing
from reproduce_common import RESULTS, Options, interval
from reproduce_memory_figure import METHODS, SHRUNK

SIZES = ("full", "laptop")
YES, PARTLY, NO, OPEN = "reproduced", "partly", "not reproduced", "not measured yet"
MIN_SEEDS = 3  # with fewer, an interval over seeds is too wide to say anything
MARGIN = 0.01  # an accuracy within a point of another is as good
Content = Mapping[str, Any]
Contents = Mapping[str, Content]  # by claim, of one size


@dataclass(frozen=True)
class Row:
    """One line of the table: what the paper says, and how to read and judge what we found."""

    claim: str
    title: str
    paper: str
    rule: str
    judge: Callable[[Contents], tuple[str, str]]  # the files' contents to our figure and the verdict


def grade(holds: Sequence[bool]) -> str:
    """The verdict on a claim of several parts, each of which surely holds or does not."""
    return YES if all(holds) else PARTLY if any(holds) else NO


def judge_memory(name: str) -> Callable[[Contents], tuple[str, str]]:
    def judge(contents: Contents) -> tuple[str, str]:
        found = contents["memory"]["summary"][name]
        saved, paper = found["saving_percent"].get("reference"), found["paper_percent"]
        if saved is None:
            return "the paper's setting did not fit into memory", OPEN
        figure = f"dense algorithm {saved:.1f} % or {describe_saving(found)}"
        if "dora" in found["saving_percent"]:
            figure += f"; ours {found['saving_percent']['dora']:.1f} %"
        if "ours_to_lora" in found:
            figure += f"; with the norm detached ours takes {found['ours_to_lora']:.2f} of LoRA's memory by default"
            if found["ours_paper_dropout_to_lora"] != found["ours_to_lora"]:
                figure += f" and {found['ours_paper_dropout_to_lora']:.2f} with the paper's dropout"
        values = found["saving_percent_by_setting"].values()
        if abs(saved - paper) <= 0.2 * paper:
            return figure, YES
        return figure, PARTLY if max(values) >= 0.8 * paper or saved >= 0.5 * paper else NO

    return judge


def judge_detach(contents: Contents) -> tuple[str, str]:
    summary = contents["detach"]["summary"]
    totals, differences = summary["total_mib"], dict(summary["differences"])
    saving = {m: 100 * (1 - totals[m] / totals[f"{m}_not_detached"]) for m in ("reference", "dora")}
    if "vl_bart" in contents:
        differences["VL-BART"] = contents["vl_bart"]["summary"]["differences"]["dora - dora_not_detached"]
    figure = "detached - not: " + "; ".join(f"{task} {describe_gain(d)}" for task, d in differences.items())
    figure += f"; memory saved on the dense algorithm {saving['reference']:.1f} %, on ours {saving['dora']:.1f} %"
    if min(len(c["seeds"]) for name, c in contents.items() if name in ("detach", "vl_bart")) < MIN_SEEDS:
        return figure, OPEN
    return figure, grade([d["low"] > -MARGIN for d in differences.values()])


def judge_pattern(contents: Contents) -> tuple[str, str]:
    summary = contents["pattern"]["summary"]
    paper, queries = summary["paper"], summary["correlations"]["query projections"]
    figure = "query projections: " + ", ".join(f"{NAMES[m]} {describe_correlation(c)}" for m, c in queries.items())
    certain = [queries[m]["low"] * queries[m]["high"] > 0 and queries[m]["r"] * paper[m] > 0 for m in paper]
    if all(certain):
        return figure, YES
    ordered = queries["lora"]["r"] > max(queries["dora"]["r"], queries["full"]["r"])
    return figure, PARTLY if any(certain) and ordered else NO


def judge_gain(contents: Contents) -> tuple[str, str]:
    content = contents["accuracy"]
    gains = content["summary"]["gains"]
    figure = "DoRA - LoRA: " + "; ".join(f"{task} {describe_gain(gain)}" for task, gain in gains.items())
    if len(content["seeds"]) < MIN_SEEDS:
        return figure, OPEN
    return figure, grade([gain["low"] > -MARGIN for gain in gains.values()])


def judge_low_rank(contents: Contents) -> tuple[str, str]:
    """Whether DoRA's gain at the lowest rank is surely positive and above that at the highest."""
    content = contents["accuracy"]
    texts, certain = [], []
    for task in content["summary"]["gains"]:
        cases = {(c["method"], c["rank"]): c for c in content["summary"]["cases"].values() if c["task"] == task}
        ranks = sorted({rank for _, rank in cases if rank})
        gains = {rank: cases["dora", rank]["mean"] - cases["lora", rank]["mean"] for rank in ranks}
        texts.append(
            f"{task} " + ", ".join(f"r={rank} {round(100 * gain, 1) + 0.0:+.1f}" for rank, gain in gains.items())
        )
        low, high = ranks[0], ranks[-1]
        at_low, at_high = (
            [a - b for a, b in zip(cases["dora", r]["accuracies"], cases["lora", r]["accuracies"], strict=True)]
            for r in (low, high)
        )
        fall = interval([a - b for a, b in zip(at_low, at_high, strict=True)])
        texts[-1] += f", lowest - highest {describe_gain(fall).replace(' points', '')}"
        certain.append(interval(at_low)["low"] > 0 and fall["low"] > 0)
    figure = "DoRA - LoRA in points: " + "; ".join(texts)
    if len(content["seeds"]) < MIN_SEEDS or len(ranks) < 2:
        return figure, OPEN
    return figure, grade(certain)


def judge_vl_bart(claim: str) -> Callable[[Contents], tuple[str, str]]:
    def judge(contents: Contents) -> tuple[str, str]:
        content = contents[claim]
        summary = content["summary"]
        methods, differences = summary["methods"], summary["differences"]
        figure = ", ".join(f"{NAMES[m]} {100 * methods[m]['mean']:.1f} %" for m in ("full", "lora", "dora"))
        gain, to_full = differences["dora - lora"], differences["dora - full"]
        figure += f"; question alone {100 * summary['question_only']:.1f} %; DoRA - LoRA {describe_gain(gain)}"
        figure += f", DoRA - full {describe_gain(to_full)}"
        if len(content["seeds"]) < MIN_SEEDS:
            return figure, OPEN
        if methods["dora"]["mean"] <= max(summary["question_only"], methods["dora"]["swapped"]) or gain["high"] < 0:
            return figure, NO
        beats, equals = gain["low"] > 0, to_full["low"] > -MARGIN
        return figure, grade([beats] if claim == "vl_bart_video" else [beats, equals])  # of videos it says no more

    return judge


NAMES = {
    "full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "dora_not_detached": "DoRA, not detached",
}  # fmt: skip


def describe_gain(gain: Mapping[str, float]) -> str:
    mean, low, high = (f"{round(100 * gain[name], 1) + 0.0:+.1f}" for name in ("mean", "low", "high"))  # no -0.0
    return f"{mean} points [{low}, {high}]"


def describe_correlation(found: Mapping[str, float]) -> str:
    return f"{found['r']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def describe_saving(found: Mapping[str, Any]) -> str:
    """What detaching saves on the dense algorithm: measured, from the shapes, and from those of the real model."""
    measured, predicted = (found["saved_mib"][name] for name in ("measured", "predicted"))
    at_full_size, paper = (found["saved_gb"][name] for name in ("at_full_size", "paper"))
    whole = f"for the real model {at_full_size:.2f} GB, paper {paper:.1f} GB"
    return f"{measured:.2f} MiB (predicted from shapes {predicted:.2f} MiB, {whole})"


# ---- the sections below the table, a function a claim


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
            "Both models are shrunk, widths, layers, vocabulary and batch, so that all parts of the memory keep their "
            "shares. It is counted, not measured by an allocator: the exact bytes of weights, gradients, AdamW's "
            "moments and what is kept for the backward pass. The GB at full size are computed from the real shapes.",
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
MEMORY_RULE = (
    "reproduced: within a fifth of the paper's saving in per cent at its batch and the cutoff of its script, on the "
    "dense algorithm; partly: at least half of it there, or four fifths of it elsewhere in the sweep"
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
        "reproduced: on every task the whole interval of the difference is above -1 point; partly: on some task; not "
        "reproduced: on none", judge_detach,
    ),
    Row(
        "pattern", "Magnitude and direction change as in full fine-tuning, unlike in LoRA",
        "correlation of dM with dD: full -0.62, LoRA +0.83, DoRA -0.31",
        "reproduced: all three intervals of the query projections lie on the paper's side of 0; partly: at least one "
        "does, and LoRA's correlation is the largest", judge_pattern,
    ),
    Row(
        "accuracy", "DoRA matches or beats LoRA", "LLaMA-7B 74.7 to 78.4, LLaMA3-8B 80.8 to 85.2",
        "reproduced: on every task the whole interval of DoRA's gain, averaged over ranks, is above -1 point; partly: "
        "on some task; not reproduced: on none", judge_gain,
    ),
    Row(
        "accuracy", "most clearly at low rank", "r=4: 39.5 to 61.9; r=64: 65.8 to 72.1 (LLaMA-7B)",
        "reproduced: on every task the intervals of DoRA's gain at the lowest rank, and of that gain minus the gain at "
        "the highest rank, are above 0; partly: on some task; not reproduced: on none", judge_low_rank,
    ),
    Row(
        "vl_bart", "VL-BART, image questions: DoRA beats LoRA and equals full fine-tuning",
        "full 77.3, LoRA 76.5, DoRA 77.4 (average of four tasks)",
        "reproduced: the whole interval of DoRA's gain over LoRA is above 0, and that over full fine-tuning above -1 "
        "point; partly: one of them is; not reproduced: neither, or that over LoRA is below 0, or DoRA does no better "
        "than a guess from the question alone, or than with another question's picture", judge_vl_bart("vl_bart"),
    ),
    Row(
        "vl_bart_video", "VL-BART, video questions: DoRA beats LoRA", "full 87.5, LoRA 83.5, DoRA 85.4",
        "reproduced: the whole interval of DoRA's gain over LoRA is above 0, and DoRA does better than a guess from "
        "the question alone and than with another question's picture; not reproduced: all else",
        judge_vl_bart("vl_bart_video"),
    ),
)  # fmt: skip


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
