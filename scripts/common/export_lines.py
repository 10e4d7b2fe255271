"""README's sentences and its table of what exports cost and what codes keep, from stored results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merge_table(report: Mapping[str, Any] | None) -> str:
    """Markdown, one line a way to merge, from what scripts/benchmark_merge.py stores; empty without it."""
    if report is None:
        return ""
    merge, setting = report["merge"], report["setting"]
    names = {
        "files": "`--as merged`",
        "resumed": f"the rest of it, killed after {merge['resumed']['finished_before']} of {setting['files']} files",
        "loaded": "`merge_and_unload().save_pretrained`",
    }
    lines = [
        f"| a base of {setting['gigabytes']:.1f} GB, largest tensor {setting['largest_tensor_mib']:.0f} MiB | time | "
        f"largest resident memory, {merge['files']['before_mib']:.0f} MiB of it imports |",
        "|---|---:|---:|",
    ]
    for key, name in names.items():
        lines.append(f"| {name} | {merge[key]['time_s']:.0f} s | {merge[key]['peak_mib']:.0f} MiB |")
    return "\n".join(lines)


def codes_table(report: Mapping[str, Any]) -> str:
    """Markdown, one line a format of codes, from what scripts/export_codes.py stores."""
    lines = [
        "| codes | c in the scales, model in fp16 | in bf16 | merged and quantised again, in fp16 |",
        "|---|---:|---:|---:|",
    ]
    rows = report["rows"]
    for name in dict.fromkeys(row["format"] for row in rows):
        own = {row["dtype"]: row for row in rows if row["format"] == name}
        again = next(row["quantised_again"] for row in own.values() if "quantised_again" in row)
        scales = (f"{own[dtype]['in_scales']:.2g}" for dtype in ("float16", "bfloat16"))
        lines.append(f"| {name} | {' | '.join(scales)} | {again:.2g} |")
    return "\n".join(lines)
