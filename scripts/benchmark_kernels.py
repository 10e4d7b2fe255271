"""Bytes per second of the composition kernels on one layer, against a device-to-device copy.

    python scripts/benchmark_kernels.py                      # 8,192 tokens, 4096 x 4096, bf16, on a GPU
    TRITON_INTERPRET=1 python scripts/benchmark_kernels.py --device cpu --tokens 64 --width 48   # runs, says nothing

Each kernel counts the bytes that it cannot do without: every input read once, every output written once. Buffers
rotate, so that none is left in the cache. Results are compared with float64 first. Expected result: a table of GB/s and
ratios to the copy, the same in scripts/benchmarks/results/kernels_DEVICE.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from dora_peft.ops.kernels import linear as kernels

# 64 MiB each by default: several times the largest cache
BUFFERS = 4


def median_seconds(run: Callable[[int], object], device: torch.device, rounds: int) -> float:
    """Of one call; `run` gets a number that goes around the buffers."""
    for number in range(BUFFERS):
        # tunes and warms up
        run(number)
    seconds = []
    for number in range(rounds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(number % BUFFERS)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            run(number % BUFFERS)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def check(name: str, found: Tensor, expected: Tensor) -> None:
    error = ((found.double() - expected).norm() / expected.norm()).item()
    if not error < 0.01:
        raise SystemExit(f"{name} is off by {error:.1e} (relative); nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--width", type=positive, default=4096, help="features in and out")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--rounds", type=positive, default=50)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    n, width, r, device, dtype = options.tokens, options.width, options.rank, options.device, torch.bfloat16
    torch.manual_seed(0)
    z, g, out = ([torch.randn(n, width, device=device, dtype=dtype) for _ in range(BUFFERS)] for _ in range(3))
    u = torch.randn(n, r, device=device, dtype=dtype)
    B, c = torch.randn(width, r, device=device), 1 + 0.1 * torch.rand(width, device=device)

    y = kernels.scaled_sum(z[0], u, B, c, None, 0.5, out=torch.empty_like(z[0]))
    check("scaled_sum", y, c.double() * z[0].double() + u.double() @ (0.5 * c[:, None] * B).to(dtype).double().T)
    scaled, sums = kernels.scale_and_sum(g[0], c, z[0], None)
    check("scale_and_sum", scaled, c.double() * g[0].double())
    assert sums is not None
    check("scale_and_sum", sums.sum(0), (g[0].double() * z[0].double()).sum(0))

    tensor = n * width * dtype.itemsize
    runs: dict[str, tuple[int, Callable[[int], object]]] = {
        "copy": (2 * tensor, lambda i: out[i].copy_(z[i])),
        "scaled_sum": (2 * tensor, lambda i: kernels.scaled_sum(z[i], u, B, c, None, 0.5, out=out[i])),
        "scale_and_sum": (3 * tensor, lambda i: kernels.scale_and_sum(g[i], c, z[i], None)),
    }
    rates = {name: size / median_seconds(run, device, options.rounds) / 1e9 for name, (size, run) in runs.items()}
    for name, rate in rates.items():
        print(f"{name:>14}  {rate:10.1f} GB/s  {rate / rates['copy']:.3f}")
    path = options.results / f"kernels_{device.type}.json"
    setting = {name: getattr(options, name) for name in ("tokens", "width", "rank", "rounds")}
    write_json(path, {**describe_machine(device), "setting": setting, "gb_per_s": rates})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
