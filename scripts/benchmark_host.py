"""How long the host takes for one adapted linear layer on a GPU, on a machine without one.

    python scripts/benchmark_host.py                      # a minute, on one core
    python scripts/benchmark_host.py --rounds 3 --steps 5 # runs, says little
    # another checkout's dora_peft
    python scripts/benchmark_host.py --package ../before --commit ID --name host_cpu_before

A GPU waits for the host if Python takes longer to launch an operation than the GPU to run it. So the driver is a stub
(benchmarks/stubbed_driver.py), launching Triton's kernels does nothing, and torch's operations run on CPU tensors of a
few numbers: what is left is Python and torch's dispatch, for every contender alike. What a launch costs inside the
driver, about 5 us for each kernel of either, is not in it. Forward and backward, contenders interleaved, the median of
all rounds: of one layer that is called alone, and of a model of 28 (as four decoder layers have) by the number of its
layers, where our norms are checked for all layers at once, as in training. Expected result: a table of us and ratios to
LoRA in the same place, the same in scripts/benchmarks/results/host_cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.arguments import positive
from common.files import write_json

if TYPE_CHECKING:
    from peft import LoraConfig

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results"
TOKENS, WIDTH, RANK = 8, 16, 16
DTYPES = {"fp32 adapter, bf16 base": (torch.float32, torch.bfloat16), "bf16 both": (torch.bfloat16, torch.bfloat16)}
DROPOUTS = (0.0, 0.05)
# Linear layers of a model, seven in each decoder layer.
LAYERS = 28


def steps(adapter: torch.dtype, base: torch.dtype, p: float) -> dict[str, tuple[Callable[[], object], int]]:
    """A forward and a backward pass of each contender, and of how many layers it is."""
    from peft import LoraConfig

    from dora_peft import DoraConfig

    configs: dict[str, tuple[type[LoraConfig], dict[str, Any]]] = {
        "LoRA": (LoraConfig, {}),
        "PEFT DoRA": (LoraConfig, {"use_dora": True}),
        "ours": (DoraConfig, {}),
    }
    found: dict[str, tuple[Callable[[], object], int]] = {}
    for name, (config, options) in configs.items():
        for count in (1, LAYERS):
            options |= {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": p}
            model = adapted(count, base, adapter is torch.float32, config, options)
            found[name + " in a model" * (count > 1)] = step_of(model if count > 1 else model[0], base), count
    found["ours, v and checks aside"] = linear_alone(adapter, base, p), 1
    return found


def adapted(
    count: int, base: torch.dtype, autocast: bool, config: type[LoraConfig], options: dict[str, Any]
) -> torch.nn.Sequential:
    """Linear layers in a row, adapted, in training."""
    from peft import get_peft_model

    import dora_peft

    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=base) for _ in range(count)))
    targets = [str(number) for number in range(count)]
    # a kernel that computes nothing would leave magnitudes of 0, which are looked at apart in every pass
    with dora_peft.implementation("torch"):
        get_peft_model(
            model,  # type: ignore[arg-type]
            config(target_modules=targets, **options),
            autocast_adapter_dtype=autocast,
        )
    return model.train()


def step_of(layer: torch.nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    x, grad = torch.randn(1, TOKENS, WIDTH, dtype=dtype), torch.randn(1, TOKENS, WIDTH, dtype=dtype)
    x.requires_grad_()
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), leaves, grad)


def reference(name: str) -> str:
    """What a contender is set against."""
    return "LoRA in a model" if name.endswith("in a model") else "LoRA"


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
    parser.add_argument("--steps", type=positive, default=56, help="of each contender's layer in a round")
    parser.add_argument("--package", type=Path, help="folder of another dora_peft to measure")
    parser.add_argument("--commit", help="that of --package")
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
                print(f"  {name:<26}{us:8.1f} us  {us / times[reference(name)]:6.2f}")
    setting = {"tokens": TOKENS, "width": WIDTH, "rank": RANK, "layers of a model": LAYERS}
    setting |= {"rounds": options.rounds, "steps": options.steps}
    path = options.results / f"{options.name}.json"
    machine = describe_machine(torch.device("cpu"))
    if options.package is not None:
        machine |= {"commit": options.commit, "modified": None}
    write_json(path, {**machine, "setting": setting, "host_us": results})
    print(f"wrote {path}")


def measure(contenders: dict[str, tuple[Callable[[], object], int]], rounds: int, count: int) -> dict[str, float]:
    """The median time of a step and a layer in us."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for run, _ in contenders.values():
        # compiles, tunes and warms up
        for _ in range(5):
            run()
    for _ in range(rounds):
        for name, (run, layers) in contenders.items():
            # as many layers of each
            repeats = max(1, count // layers)
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            found[name].append((time.perf_counter() - begin) / repeats / layers * 1e6)
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


if __name__ == "__main__":
    main()
