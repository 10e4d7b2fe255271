"""Compile every Triton kernel to machine code, which needs no GPU: python tests/compile_kernels.py ARCH...

Triton's interpreter takes what its compiler refuses, such as a variable that changes its type in a loop. Run by
tests/ops/kernels/test_linear.py in another process, since a process either interprets or compiles. Prints the number of
compiled variants and the most shared memory that one takes, in bytes.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dora_peft.ops.kernels import dropout as dropout_kernels
from dora_peft.ops.kernels import grouped_norm, sample
from dora_peft.ops.kernels import linear as kernels
from dora_peft.ops.kernels import norm as norm_kernels

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES |= {torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
FP32, SEED = torch.float32, torch.int64
FLOATS = ("scaling", "k", "tiny", "drowned")
compiled = []


def compile_kernel(kernel, target, options, **pointers):
    """In every configuration, and in the first also with all whole numbers equal to 1, as Triton specialises them."""
    function = kernel.fn
    configs = kernel.configs or [triton.Config({}, num_warps=4, num_stages=2)]
    for number, config in enumerate(configs):
        for ones in (False, True)[: 1 if number else 2]:
            constants, signature = {**options, **config.kwargs}, {}
            for name in function.arg_names:
                if name in constants:
                    signature[name] = "constexpr"
                elif name in pointers:
                    signature[name] = "*" + NAMES[pointers[name]]
                elif name in FLOATS:
                    signature[name] = "fp32"
                elif name == "seed":
                    signature[name] = "i64"
                elif ones:
                    signature[name], constants[name] = "constexpr", 1
                else:
                    signature[name] = "i32"
            source = ASTSource(fn=function, signature=signature, constexprs=constants)
            result = triton.compile(
                source, target=target, options={"num_warps": config.num_warps, "num_stages": config.num_stages}
            )
            compiled.append(result.metadata.shared)


def compile_norms(target, dtype, factors, options, weight):
    options = {**options, "PRECISION": "tf32x3", "ROWS": 64, "BLOCK": 64}
    whole = {"arrived": torch.int32, "sums": torch.int64, "known": torch.int64}
    floats = dict.fromkeys(("partial", "remembered", "base", "out"), FP32)
    pointers = {**weight, **whole, **floats, "lora_A": factors, "lora_B": factors}
    compile_kernel(norm_kernels._norm, target, options, **pointers)
    compile_kernel(norm_kernels._checked_norm, target, {**options, "EPSILON": 1e-7}, **pointers)
    tables = {"table": torch.int64, "found": torch.int64}
    tables |= dict.fromkeys(("entries", "due", "finished"), torch.int32)
    like = {"like_A": factors, "like_W": weight["weight"]}
    options = {**options, "EPSILON": 1e-7, "SIZE": 1024}
    compile_kernel(grouped_norm._refresh_all, target, options, **tables, **whole, **floats, **like)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    bits = {f"like_{name}": kinds[t.itemsize] for name, t in (("A", factors), ("W", weight["weight"]), ("S", FP32))}
    options = {"FOUR_BIT": options["FOUR_BIT"], "SIZE": 2048, "SAMPLE": 1024}
    compile_kernel(grouped_norm._check_all, target, options, **tables, **whole, **bits)


def compile_all(target, dtype, factors, ranks):
    small = {"PRECISION": "ieee", "RANKS": ranks}
    for bias in (False, True):
        options = {"HAS_BIAS": bias, "FOLDED": bias, **small}
        compile_kernel(
            kernels._scaled_sum, target, options, z=dtype, u=dtype, lora_B=factors, c=FP32, bias=dtype, out=dtype
        )
        options = {"HAS_BIAS": bias, "SUM": not bias}
        compile_kernel(
            kernels._scale_and_sum, target, options, g=dtype, y=dtype, c=FP32, bias=dtype, scaled=dtype, sums=FP32
        )
    for four_bit in (False, True):
        stored = {"FOUR_BIT": four_bit, "HALF": dtype is torch.float16, "BRAIN": dtype is torch.bfloat16}
        weight = {"weight": torch.uint8 if four_bit else dtype, "absmax": FP32, "code": FP32}
        compile_kernel(
            kernels._magnitude_gradient,
            target,
            {"HAS_BIAS": True, **stored, "PRECISION": "ieee", "SAMPLE": 64, "CHECKED": True, "ROWS": 64, "COLUMNS": 32,
             "BLOCK": 64},
            **weight, sums=FP32, g=dtype, y=dtype, x=dtype, u=dtype, lora_B=factors, c=FP32, bias=dtype, out=FP32,
            gone=torch.int32,
        )  # fmt: skip
        for reads in (0, 3) if four_bit else (0, 1, 2):
            compile_norms(target, dtype, factors, {**stored, "READS": reads, "RANKS": ranks, "WHOLE": True}, weight)
        compile_norms(target, dtype, factors, {**stored, "READS": 0, "RANKS": ranks, "WHOLE": False}, weight)
        bits = {2: torch.int16, 4: torch.int32}
        compile_kernel(
            norm_kernels._digest,
            target,
            {"SIZE": 1024},
            lora_A=bits[factors.itemsize], lora_B=bits[factors.itemsize], sums=torch.int64,
            weight=torch.uint8 if four_bit else bits[dtype.itemsize],
        )  # fmt: skip
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    pointers = {"y": bits, "rows": bits, "diagonal": bits}
    compile_kernel(sample._take_sample, target, {"BLOCK": 1024}, **pointers)
    compile_kernel(sample._compare_sample, target, {"BLOCK": 1024}, **pointers, gone=torch.int32)
    for on_host in (False, True):
        seed, options = {} if on_host else {"seed": SEED}, {"ON_HOST": on_host, **small}
        compile_kernel(dropout_kernels._dropped_product, target, options, x=dtype, lora_A=factors, out=dtype, **seed)
        compile_kernel(dropout_kernels._dropped_gradient, target, options, du=dtype, x=dtype, out=factors, **seed)
        for add in (False, True):
            options = {"ADD": add, "ON_HOST": on_host, **small}
            compile_kernel(dropout_kernels._add_low_rank, target, options, du=dtype, lora_A=factors, out=dtype, **seed)


if __name__ == "__main__":
    dtypes = [(torch.bfloat16, FP32)]
    if "all" in sys.argv:
        dtypes += [(FP32, FP32), (torch.float16, FP32), (torch.bfloat16, torch.bfloat16)]
    for arch in (word for word in sys.argv[1:] if word != "all"):
        for x, factors in dtypes:
            for ranks in (16, 64) if "all" in sys.argv else (16,):
                compile_all(GPUTarget("cuda", int(arch), 32), x, factors, ranks)
    print(len(compiled), max(compiled))
