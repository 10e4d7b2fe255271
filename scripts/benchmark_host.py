"""How long the host takes for one adapted linear layer on a GPU, on a machine without one.

    python scripts/benchmark_host.py                      # a minute, on one core
    python scripts/benchmark_host.py --rounds 3 --steps 5 # runs, says little
    python scripts/benchmark_host.py --package ../before --name host_cpu_before   # another checkout's dora_peft

A GPU waits for the host if Python takes longer to launch an operation than the GPU to run it. So the driver is a stub
(benchmarks/stubbed_driver.py), launching Triton's kernels does nothing, and torch's operations run on CPU tensors of a
few numbers: what is left is Python and torch's dispatch, for every contender alike. What a launch costs inside the
driver, about 5 us for each kernel of either, is not in it. Forward and backward of one layer, contenders interleaved,
the median of all rounds. Expected result: a table of us and ratios to LoRA, the same in
scripts/benchmarks/results/host_cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.arguments import positive
from common.files import write_json

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results"
TOKENS, WIDTH, RANK = 8, 16, 16
DTYPES = {"fp32 adapter, bf16 base": (torch.float32, torch.bfloat16), "bf16 both": (torch.bfloat16, torch.bfloat16)}
DROPOUTS = (0.0, 0.05)


def steps(adapter: torch.dtype, base: torch.dtype, p: float) -> dict[str, Callable[[], object]]:
    """A forward and a backward pass of each contender's layer."""
    from peft import LoraConfig, get_peft_model

    from dora_peft import DoraConfig

    configs: dict[str, tuple[type[LoraConfig], dict[str, Any]]] = {
        "LoRA": (LoraConfig, {}),
        "PEFT DoRA": (LoraConfig, {"use_dora": True}),
        "ours": (DoraConfig, {}),
    }
    found: dict[str, Callable[[], object]] = {}
    for name, (config, options) in configs.items():
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=base))
        adapted = get_peft_model(
            model,  # type: ignore[arg-type]
            config(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], lora_dropout=p, **options),
            autocast_adapter_dtype=adapter is torch.float32,
        )
        found[name] = step_of(adapted.base_model.model[0].train(), base)
    found["ours, v and checks aside"] = linear_alone(adapter, base, p)
    return found


def step_of(layer: torch.nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    x, grad = torch.randn(1, TOKENS, WIDTH, dtype=dtype), torch.randn(1, TOKENS, WIDTH, dtype=dtype)
    x.requires_grad_()
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), leaves, grad)


def linear_alone(adapter: torch.dtype, dtype: torch.dtype, p: float) -> Callable[[], object]:
    """The autograd function, without the layer around it."""
    from dora_peft.ops.linear import linear

    x, grad = torch.randn(1, TOKENS, WIDTH, dtype=dtype), torch.randn(1, TOKENS, WIDTH, dtype=dtype)
    weight, A, B = torch.randn(WIDTH, WIDTH, dtype=dtype), torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    leaves = [x, A.to(adapter), B.to(adapter), torch.rand(WIDTH) + 1]
    for leaf in leaves:
        leaf.requires_grad_()
    x, A, B, m = leaves
    v = torch.rand(WIDTH) + 1
    return lambda: torch.autograd.grad(linear(x, A, B, m / v, 2.0, weight=weight, dropout_p=p), leaves, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=31)
    parser.add_argument("--steps", type=positive, default=40, help="of each contender in a round")
    parser.add_argument("--package", type=Path, help="folder of another dora_peft to measure")
    parser.add_argument("--name", default="host_cpu", help="of the result's file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    if options.package is not None:
        sys.path.insert(0, str(options.package.resolve()))
    # these import dora_peft
    from benchmarks import stubbed_driver
    from common.machine import describe_machine

    stubbed_driver.install()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # its bf16 products take longer to set up than these are worth
    torch.backends.mkldnn.set_flags(False)
    results = {}
    for words, (adapter, base) in DTYPES.items():
        for p in DROPOUTS:
            times = measure(steps(adapter, base, p), options.rounds, options.steps)
            results[f"{words}, dropout {p}"] = times
            print(f"{words}, dropout {p}")
            for name, us in times.items():
                print(f"  {name:<26}{us:8.1f} us  {us / times['LoRA']:6.2f}")
    setting = {"tokens": TOKENS, "width": WIDTH, "rank": RANK, "rounds": options.rounds, "steps": options.steps}
    path = options.results / f"{options.name}.json"
    write_json(path, {**describe_machine(torch.device("cpu")), "setting": setting, "host_us": results})
    print(f"wrote {path}")


def measure(contenders: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """The median time of a step in us."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        # compiles, tunes and warms up
        for _ in range(5):
            run()
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            for _ in range(count):
                run()
            found[name].append((time.perf_counter() - begin) / count * 1e6)
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


if __name__ == "__main__":
    main()
