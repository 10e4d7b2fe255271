"""Write the README's tables from the stored result files.

    python scripts/update_readme.py           # rewrites README.md
    python scripts/update_readme.py --check   # exits with 1 if README.md is not what the results say

Expected result: the text between `<!-- table: memory -->` and `<!-- end: memory -->` holds one table per file
`scripts/benchmarks/results/memory_*.json`, as `scripts/benchmark_memory.py --json` wrote them, with device and
versions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where the README is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    tables = [memory_table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("memory_*.json"))]
    after = re.sub(
        r"(<!-- table: memory -->\n).*?(<!-- end: memory -->)",
        lambda m: m.group(1) + "\n\n".join(tables) + "\n" + m.group(2),
        before,
        flags=re.DOTALL,
    )
    if arguments.check:
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
