"""The table of what servers make of an adapter, from the rows that scripts/check_serving.py stores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# The forms in the order of the table, and what each is.
FORMS = {
    "dora": "the DoRA adapter itself",
    "exact": "`exact`: a base of its own and a LoRA",
    "lora": "`lora`",
    "gguf": "`lora --to gguf`",
    "merged": "`merged`",
}
DTYPES = ("fp32", "fp16", "bf16")
# The columns: what is written over them, with the versions of these.
ENGINES = {
    "transformers": "transformers {transformers}, PEFT {peft}",
    "vllm": "vLLM {vLLM}",
    "llama": "llama.cpp {llama.cpp} by node-llama-cpp {node-llama-cpp}",
    "sglang": "SGLang {SGLang}, its check of a configuration",
}
UNMEASURED = "not measured yet"


def heading(engine: str, versions: Mapping[str, Mapping[str, str]]) -> str:
    """What an engine's column is called; without versions if it has not been run."""
    found = versions.get(engine, {})
    return re.sub(r" \{([^}]*)\}", lambda m: f" {found[m[1]]}" if m[1] in found else "", ENGINES[engine])


def cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one engine for one form, in the order of `DTYPES`."""
    ordered = sorted(rows, key=lambda row: DTYPES.index(row["dtype"]))
    if not ordered:
        return "-"
    if all("refused" in row for row in ordered):
        return "refused"
    if all("scaling" in row for row in ordered):
        return "taken"
    return ", ".join(
        "refused" if "refused" in row else f"{row['error']:.0e}" if row["error"] else "0" for row in ordered
    )


def serving_table(report: Mapping[str, Any]) -> str:
    """Markdown, one line a model and form: error / what the adapter does, in fp32, fp16 and bf16."""
    if not report.get("rows"):
        return UNMEASURED
    rows: Sequence[Mapping[str, Any]] = report["rows"]
    lines = [
        f"| model | written as | {' | '.join(heading(engine, report['versions']) for engine in ENGINES)} |",
        f"|---|---|{'---:|' * len(ENGINES)}",
    ]
    # A model of the reader's kind comes before the tiny ones that are there for their layers.
    for model in sorted({row["model"] for row in rows}, key=lambda model: (model.startswith("tiny"), model)):
        for form, about in FORMS.items():
            here = [row for row in rows if row["model"] == model and row["route"] == form]
            if not here:
                continue
            ranks = sorted({row["rank"] for row in here if "rank" in row})
            written = about + (f" of rank {ranks[0]}" if ranks else "")
            cells = [cell([row for row in here if row["engine"] == engine]) for engine in ENGINES]
            lines.append(f"| {model} | {written} | {' | '.join(cells)} |")
    return "\n".join(lines)
