"""The table of other tools' formats: what was compared with their own software, and what with a restatement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_peft.adapters import FORMATS

# Whose adapters they are, and what has to be said of them.
ABOUT = {
    "peft": "PEFT's `use_dora`, and ours; both spellings of the magnitude; diffusers' files (the tests run diffusers)",
    "nvlabs": "the paper's code; one rank and one alpha",
    "lycoris": "LyCORIS from 3.2, kohya's scripts; its flattened names need `--base` to be read, unless we wrote them",
    "onetrainer": "the same with OneTrainer's prefix; norms per input column are refused, or fitted with `--refit`",
    "ai-toolkit": "s is folded into B",
    "mlx": "mlx-lm; linear layers, one rank and one scale",
    "torchtune": "LLaMA's modules; `--base` says the heads that order rows of q and k; with `--from` also what it "
    "exports to PEFT's keys, where magnitudes stay in its own order",
    "trtllm": "TensorRT-LLM's engine, after its normaliser: m / norm; needs `--base`, and `--from` to be read",
    "comfyui-2026": "for ComfyUI while it divides by the base's norm; needs `--base`, and `--from` to be read",
}
WAYS = ("it reads ours", "we read its")


def formats_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one line a format, from the rows that scripts/check_formats.py stores."""
    lines = [f"| `--to` | what it is | compared with | {' | '.join(WAYS)} |", "|---|---|---|---:|---:|"]
    for name in FORMATS:
        row = rows.get(name)
        against, errors = "a restatement of its readers' formula", ["1e-5 in the tests", "-"]
        if row is not None:
            against = ", ".join(f"{tool} {version}" for tool, version in row["versions"].items())
            errors = [f"{row[way]:.0e}" for way in WAYS]
        lines.append(f"| {name} | {ABOUT[name]} | {against} | {' | '.join(errors)} |")
    return "\n".join(lines)
