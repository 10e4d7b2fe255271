"""Compile Triton kernels to machine code, which needs no GPU: python tests/compile_kernels.py CAPABILITY... [all|norms]

Triton's interpreter takes what its compiler refuses, such as a variable that changes its type in a loop. Run by
tests/ops/kernels/test_compiled.py in another process, since a process either interprets or compiles. The variants are
those that launches ask for, in every configuration that is offered; with `norms`, the norm's kernels for each way to
read W0. Prints a JSON object a variant and a line.
"""

import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402

from benchmarks.kernel_compiler import (  # noqa: E402
    compile_for,
    copied_ahead,
    loads_of_16_bytes,
    narrow_products,
    offered,
    usage,
)
from benchmarks.kernel_examples import EXAMPLES, Case, launches  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# as whole numbers equal to 1, which Triton compiles into the code
ONES = Case(tokens=1, out=1, features=1, rank=1)
# of sizes that are no multiples of 16, so that nothing is known of them
ODD = Case(tokens=2047, out=4097, features=1001, rank=33, with_bias=True, on_device=True)
# each kernel in all its configurations, to be done in half a minute
WIDE = ["compose", "magnitude", "dropped product", "add low rank", "dropped gradient", "check and norm of all"]
FEW = [
    (Case(), [example for example in EXAMPLES if example not in (*WIDE, "scale")]),
    (Case(rank=64, with_bias=True, four_bit=True, by_columns=True, on_device=True), WIDE),
    (Case(rank=384), ["compose"]),
]
ALL = [
    *FEW,
    *(
        (case, None)
        for case in [
            Case(),
            ONES,
            ODD,
            *(Case(rank=rank) for rank in (32, 64, 384)),
            Case(rank=8, dtype=BF16, factors=BF16, with_bias=True),
            Case(rank=64, dtype=FP16, factors=FP32, four_bit=True),
            Case(rank=64, dtype=FP16, factors=FP16, by_columns=True, with_bias=True),
            Case(rank=16, dtype=FP32, with_bias=True),
            Case(rank=64, dtype=FP32, by_columns=True, on_device=True),
            dataclasses.replace(ODD, dtype=FP32, rank=384),
        ]
    ),
]
NORMS = [
    (case, ["norm", "check and norm", "check and norm of all"])
    for case in [
        Case(),
        Case(rank=64),
        Case(dtype=FP32),
        Case(four_bit=True),
        Case(by_columns=True),
    ]
]


def main() -> None:
    chosen = ALL if "all" in sys.argv else NORMS if "norms" in sys.argv else FEW
    for capability in (int(word) for word in sys.argv[1:] if word.isdigit()):
        for case, examples in chosen:
            for launch in launches(case, examples):
                for config in offered(capability, launch):
                    compiled = compile_for(capability, launch, config)
                    found = {
                        **dataclasses.asdict(usage(compiled)), "narrow": narrow_products(compiled),
                        "copied": copied_ahead(compiled), "wide": loads_of_16_bytes(compiled),
                    }  # fmt: skip
                    variant = {
                        "capability": capability, "kernel": launch.name, "example": launch.example,
                        "config": str(config), "rank": case.rank, "dtype": str(case.dtype),
                        "four_bit": case.four_bit, "by_columns": case.by_columns,
                    }  # fmt: skip
                    print(json.dumps({**variant, **found}))


if __name__ == "__main__":
    main()
