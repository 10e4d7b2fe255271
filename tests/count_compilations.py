"""How many kernels the self-check of dora_peft and scripts/check_gpu.py compile, counted without a GPU.

    PYTHONPATH=.:scripts python tests/count_compilations.py [CHECK...]

Triton compiles for an H100, and a driver that does nothing stands for the GPU's: launches compute nothing, so that each
check which is not skipped has to fail. Prints for the self-check, which a GPU's first process runs, and for each group
of checks, which is one process on a GPU, the number of compilations that were not made before and their seconds, then
their sum and that of each kernel. Every configuration of a kernel is tried, as tuning does. With TRITON_CACHE_DIR
naming an empty folder it also fills that as a GPU would.
"""

import collections
import sys
import time

import torch
import triton
import triton.compiler.compiler
from triton.backends.compiler import GPUTarget

from dora_peft.ops import choice
from dora_peft.ops.kernels import checking, launch, selfcheck, tuning
from gpu import registry

compiled, seconds, compile_kernel = collections.Counter(), [0.0], triton.compile


class Utils:
    def load_binary(self, *_):
        return None, 1, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Launcher:
    def __init__(self, *_):
        pass

    def __call__(self, *_, **__):
        pass


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_benchmarker(self):
        def measure(function, **_):
            function()
            return [1.0, 1.0, 1.0]

        return measure


def timed(run):
    run()
    return 1.0


def report(group, before, begin):
    print(f"{group:<28} {compiled.total() - before:>4} compilations, {seconds[0] - begin:5.1f} s", flush=True)


def counting(source, target=None, options=None, **rest):
    begin = time.perf_counter()
    result = compile_kernel(source, target=target, options=options, **rest)
    compiled[source.name] += 1
    seconds[0] += time.perf_counter() - begin
    return result


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    # where the versions of Triton look it up
    triton.compile = triton.compiler.compile = triton.compiler.compiler.compile = counting
    choice._require_triton = lambda: None
    launch.device_of, launch.current_device, launch.current_stream = lambda _: 0, lambda: 0, lambda _: 0
    tuning.capturing, tuning.gpu, tuning.median_ms = lambda: False, lambda _: "H100", timed
    tuning.shared_memory_kib = lambda: 227
    # the first difference would end it
    checking._compare = lambda *_: None
    chosen, not_failed = sys.argv[1:] or registry.NAMES, []
    if not sys.argv[1:]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            before, begin = compiled.total(), seconds[0]
            selfcheck.run(torch.device("cpu"), dtype)
            report(f"self-check in {dtype}", before, begin)
    for group, (_, names) in registry.GROUPS.items():
        before, begin = compiled.total(), seconds[0]
        for name in names:
            if name in chosen:
                result = registry.run_check(name, torch.device("cpu"), "triton")
                not_failed += [f"{name} ({result['status']})"] if result["status"] != "failed" else []
        report(group, before, begin)
    report(f"all, by Triton {triton.__version__}", 0, 0.0)
    print(", ".join(f"{name} {count}" for name, count in sorted(compiled.items())))
    print(f"without a kernel that computes, these have not failed: {', '.join(not_failed) or 'none'}")
