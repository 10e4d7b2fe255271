"""Time of oneDNN's fp32 products against those of torch's own library on a CPU, by instruction set.

    python scripts/benchmark_products.py                              # half a minute
    ONEDNN_MAX_CPU_ISA=AVX2 python scripts/benchmark_products.py      # as on a processor without AVX-512

What dora_peft/ops/products.py chooses rests on these figures: x W0^T, and g W0 of the backward pass, whose matrix is
read along its columns. Both libraries run in turn on one thread, by its own time, so that other work disturbs little.
Expected result: a table of ratios, below 1 where oneDNN is faster; the same with the processor's instruction sets in
scripts/benchmarks/results/products_cpu_ISA.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from dora_peft.ops.torch_names import onednn_linear

# out, in, tokens
SHAPES = (
    (384, 384, 64), (1024, 384, 128), (576, 576, 224), (1536, 576, 224), (1120, 416, 600), (512, 512, 1024),
    (1376, 512, 1024), (512, 1376, 1024), (1536, 1536, 256), (4096, 1536, 256),
)  # fmt: skip


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The thread's own time of each call, all in turn, in an order shuffled every round; the first rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for number in range(rounds + 3):
        for name in shuffled.sample(sorted(calls), len(calls)):
            start = time.thread_time()
            calls[name]()
            if number >= 3:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def compare(out: int, width: int, tokens: int, rounds: int) -> dict[str, float]:
    """oneDNN's time over the other's, forward and backward."""
    onednn = onednn_linear()
    if onednn is None:
        raise SystemExit("error: this torch has no oneDNN product of the name that dora_peft knows.")
    x, g, weight = torch.randn(tokens, width), torch.randn(tokens, out), torch.randn(out, width)
    found = median_seconds(
        {
            "forward": lambda: F.linear(x, weight),
            "backward": lambda: F.linear(g, weight.T),
            "onednn forward": lambda: onednn(x, weight, None, "none", [], ""),
            "onednn backward": lambda: onednn(g, weight.T, None, "none", [], ""),
        },
        rounds,
    )
    return {name: found[f"onednn {name}"] / found[name] for name in ("forward", "backward")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=25, help="timed rounds (25)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    report: dict[str, Any] = {**describe_machine(torch.device("cpu")), "onednn_isa": limit, "results": []}
    print(f"oneDNN limited to {limit}; time of oneDNN / torch's own\n   out    in  tokens  forward  backward")
    for out, width, tokens in SHAPES:
        found = compare(out, width, tokens, options.rounds)
        report["results"].append({"out": out, "in": width, "tokens": tokens, **found})
        print(f"{out:6} {width:5} {tokens:7}  {found['forward']:7.3f}  {found['backward']:8.3f}", flush=True)
    path = options.results / f"products_cpu_{limit.lower()}.json"
    write_json(path, report)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
