"""What prepared launches give to Triton's driver, against what the kernels' launchers give it, over odd layouts.

    python tests/prepared_launches.py SIZES

Run by tests/ops/kernels/test_prepared.py in another process: Triton's interpreter, in which the tests run, launches
nothing, so that nothing is prepared there. Prints a JSON object: how many calls went by a prepared launch, and of which
kernels one gave the driver something else.
"""

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

# before anything imports Triton
from benchmarks import stubbed_driver  # noqa: E402

launched: list[tuple[Any, ...]] = []


class Numbered(stubbed_driver.Compiled):
    """Machine code that can be told from other machine code."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        Numbered.count += 1
        self.function = self.packed_metadata = Numbered.count


stubbed_driver.Launch.__call__ = lambda self, *arguments: launched.append(arguments)
stubbed_driver.Compiled = Numbered
stubbed_driver.install()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dora_peft.ops import kept_output  # noqa: E402
from dora_peft.ops.kernels import norm, plan  # noqa: E402
from dora_peft.ops.kernels.prepared import Prepared  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
draw = random.Random(0)
found = {"prepared": 0, "wrong": set()}


def made(shape: tuple[int, ...], dtype: torch.dtype, *, may_be_unaligned: bool = True) -> Tensor:
    """A contiguous tensor, in one of five calls at an address that is no multiple of 16."""
    count, first = torch.Size(shape).numel(), int(may_be_unaligned and draw.random() < 0.2)
    return torch.zeros(count + 1, dtype=dtype)[first : first + count].view(shape)


def given(call: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """Grid, stream, machine code and arguments of the last launch; three that Triton leaves to its hooks aside."""
    launched.clear()
    call(*arguments)
    numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in launched[-1]]
    return numbers[:6] + numbers[9:]


def compare(name: str, prepared: Prepared, *arguments: Any) -> None:
    by_launcher = prepared.call == prepared._first
    ours, theirs = given(prepared.call, arguments), given(prepared._launcher, arguments)
    if not by_launcher:
        found["prepared"] += 1
        if ours != theirs:
            found["wrong"].add(name)


def weight_of(kind: str, out: int, width: int, dtype: torch.dtype) -> Tensor:
    if kind == "rows":
        return made((out, width), dtype)
    return made((width, out), dtype).t() if kind == "columns" else made((out, width + 3), dtype)[:, :width]


def compare_layer(lead: tuple[int, ...], width: int, out: int, rank: int, kind: str, p: float, adapter: Any) -> None:
    """All launches of one pass of one layer; layers of one layout share what is prepared."""
    x, weight, bias = made((*lead, width), BF16), weight_of(kind, out, width, BF16), made((out,), BF16)
    A, B, c = made((rank, width), adapter), made((out, rank), adapter), made((out,), FP32)
    s, seed = draw.choice([0.5, 0.0, -2.0, 1.0, 16.0]), draw.randrange(2**32, 2**62)
    one = plan.plan_for(x, weight, bias, A, B, c, p)
    if one is not None:
        rows, g = x.view(one.x_shape), made(one.whole_shape, BF16)
        u, y = made(one.u_shape, BF16, may_be_unaligned=False), made(one.whole_shape, BF16, may_be_unaligned=False)
        z, sums = y.view(one.y_shape), made(one.sums_shape, FP32, may_be_unaligned=False)
        first, start = kept_output.draw(*one.layout)
        kept = y.new_empty(one.sample_size)
        compare("scaled sum", one._scaled_sum, z, u, B, c, bias, s)
        compare("keep sample", one._keep_sample, y, kept, first * out, start)
        compare("find change", one._find_change, y, kept, first * out, start)
        compare("scale and sum", one._scale_and_sum, g, c, y, bias, z, sums)
        into = torch.empty_like(c)
        compare("magnitude", one._magnitude_gradient, sums, g, y, rows, weight, u, B, c, bias, s, kept, into)
        if p:
            parts = torch.empty(one.parts_shape, dtype=one.parts_dtype)
            compare("dropped product", one._dropped_product, rows, A, seed, u)
            compare("add low rank", one._add_low_rank, torch.zeros_like(rows), u, A, seed)
            compare("dropped gradient", one._dropped_gradient, u, rows, seed, parts)
    check = norm._Repeated.of(weight, A, B)
    if check.usual:
        memory, zeros = norm.Memory(out, torch.device("cpu")), torch.zeros(check.count, dtype=torch.int64)
        compare("digest", check._digest, weight, A, B, zeros)
        sums, value = torch.empty(check.parts), torch.empty(out)
        kept = (memory.known, memory.remembered, memory.base)
        compare("refresh", check._refresh, *kept, weight, A, B, s, zeros, sums, value)


def main() -> None:
    for _ in range(int(sys.argv[1])):
        tokens, lead = draw.choice([1, 7, 20, 300]), draw.randrange(3)
        sizes = draw.choice([1, 16, 24, 33]), draw.choice([16, 40, 33]), draw.choice([1, 3, 16, 33])
        # all layouts of these sizes, so that what is prepared for one is not taken for another; each prepares once
        for layout in itertools.product(["rows", "columns", "slice"], [0.0, 0.3], [FP32, BF16], range(3)):
            compare_layer([(tokens,), (1, tokens), (tokens, 1)][lead], *sizes, *layout[:3])
    print(json.dumps({**found, "wrong": sorted(found["wrong"])}))


if __name__ == "__main__":
    main()
