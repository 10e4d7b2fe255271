"""Write the README's tables, and pages beside the results, from the stored result files.

    python scripts/update_readme.py           # rewrites README.md, and the pages beside the results
    python scripts/update_readme.py --check   # exits with 1 and names them if they are not what the results say

Expected result: what stands in README.md between marks such as `<!-- table: price -->` and `<!-- end: price -->`, and
whole pages beside the results in `scripts/benchmarks/results/`:

    claim          README's first sentence about costs
    price          README's table of `scripts/benchmark_price.py`; price.md has a line for each of its shapes
    formats        other tools' formats, of `scripts/engines.sh formats`
    merge          merging into files beside a loaded model, of `scripts/benchmark_merge.py`
    codes          what quantised bases keep of an adapter, of `scripts/export_codes.py`
    spelling       what each export leaves of an adapter's accuracy, of `scripts/export_accuracy.py`
    serving        what servers make of exports, of `scripts/engines.sh serve`
    gpu            how much is measured of gpu.md, what `scripts/gpu.sh` finds against its goals
    reproduction   how many claims of the paper have which verdict of `scripts/reproduce.py report`
    cpu.md         the results of `scripts/benchmark.py`, `benchmark_memory.py` and `benchmark_check.py`

Results that are not there are left out, or said to be "not measured yet".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cpu_page, price_page
from common.export_lines import codes_table, merge_table
from common.formats_table import formats_table
from common.serving_table import serving_table
from common.spelling_table import spelling_table
from reproduction.common import RESULTS as REPRODUCTION
from reproduction.report import verdicts

ROOT = Path(__file__).resolve().parent.parent
REPRODUCTION_PAGE = "scripts/reproduce/REPRODUCTION.md"
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
FORMATS = ROOT / "scripts" / "engines" / "formats.json"
CODES = ROOT / "scripts" / "engines" / "codes.json"
SPELLING = ROOT / "scripts" / "engines" / "spelling.json"
SERVING = ROOT / "scripts" / "engines" / "serving.json"


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


def reproduction_line(table: Sequence[str]) -> str:
    """What README says of the paper's claims: how many have which verdict, from the table of `verdicts`."""
    counts = Counter(row.rsplit("|", 2)[1].strip(" *") for row in table[2:])
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return (
        f"Of {sum(counts.values())} claims, at laptop size: {said} ([figures, seeds and rules]({REPRODUCTION_PAGE}))."
    )


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
    price = reports.get("price_cpu")
    after = insert(before, "claim", cpu_page.claim(reports))
    after = insert(after, "price", price_page.price_table(price))
    after = insert(after, "formats", formats_table(json.loads(FORMATS.read_text(encoding="utf-8"))["rows"]))
    after = insert(after, "merge", merge_table(reports.get("merge")))
    after = insert(after, "codes", codes_table(json.loads(CODES.read_text(encoding="utf-8"))))
    after = insert(after, "spelling", spelling_table(json.loads(SPELLING.read_text(encoding="utf-8"))["rows"]))
    after = insert(after, "serving", serving_table(json.loads(SERVING.read_text(encoding="utf-8"))))
    after = insert(after, "gpu", gpu_line(reports))
    after = insert(after, "reproduction", reproduction_line(verdicts(REPRODUCTION)))
    pages = {
        readme: after,
        RESULTS / Path(GPU_PAGE).name: gpu_page(reports),
        RESULTS / Path(cpu_page.PAGE).name: cpu_page.cpu_page(reports),
        RESULTS / Path(price_page.PAGE).name: price_page.price_page(price, reports.get("profile_cpu")),
    }
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
