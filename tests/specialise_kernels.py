"""Count what is compiled and tuned for batches of many lengths: python tests/specialise_kernels.py

Run by tests/ops/kernels/test_tuning.py in another process, since Triton's binder does not run in the interpreter; the
driver is a stub. Prints JSON: how often each kernel was compiled and how many configurations were timed, for 300
lengths and for each of two runs of the same kernel with numbers of 32 and of 64 bits.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from benchmarks import stubbed_driver
from dora_peft.ops.kernels import dropout, fused, linear, sample
from dora_peft.ops.kernels.options import KernelOptions
from dora_peft.ops.kernels.tuning import token_bucket

WIDTH, RANK = 48, 8


def step(length: int, p: float) -> None:
    x, g = torch.zeros(length, WIDTH, dtype=torch.bfloat16), torch.zeros(length, WIDTH, dtype=torch.bfloat16)
    weight, A, B = torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16), torch.zeros(RANK, WIDTH), torch.zeros(WIDTH, RANK)
    c, seed = torch.ones(WIDTH), dropout.draw_seed(x.device) if p else None
    options = KernelOptions.of(0.5, p, seed, (True, False, False, True, True, True))
    y, u = fused.forward(x, None, weight, None, A, B, c, options)
    # of which the number of elements, their distance and their places change with the length
    rows, diagonal = fused.take_sample(y, length // 3 * WIDTH, length // 2, length % 7 + 1, WIDTH, length // 2)
    gone = fused.compare_sample(y, rows, diagonal, length // 3 * WIDTH, length // 2, length % 7 + 1)
    fused.gradients(g, x, u, y, weight, None, A, B, c, options, stored=weight, d_magnitude=None, gone=gone)


def counted(run) -> dict[str, int]:
    stubbed_driver.compiled.clear()
    run()
    return dict(Counter(stubbed_driver.compiled))


def main() -> None:
    stubbed_driver.install()
    lengths = random.Random(0).sample(range(2, 5000), 300)
    configs = {
        kernel.__name__: len(kernel.configs)
        for kernel in (linear._scaled_sum_of_few_ranks, linear._scale_and_sum, linear._magnitude_gradient,
                       dropout._dropped_product, dropout._add_low_rank, dropout._dropped_gradient,
                       sample._take_sample, sample._compare_sample)
    }  # fmt: skip
    result: dict[str, object] = {"configs": configs, "buckets": len({token_bucket(length) for length in lengths})}
    for p in (0.0, 0.1):
        stubbed_driver.trials.clear()
        result[f"compiled {p}"] = counted(lambda: [step(length, p) for length in lengths])  # noqa: B023
        result[f"trials {p}"] = len(stubbed_driver.trials)
    y, few = torch.zeros(4, WIDTH), torch.zeros(8)
    for name, place in (("32 bits", 7), ("64 bits", 2**33 + 1), ("64 bits more", 2**40)):
        result[name] = counted(
            lambda: sample._take_sample[(1,)](y, few, few, few, place, place, 1, 2, 2, CLEARS=False, BLOCK=1024)  # noqa: B023
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
