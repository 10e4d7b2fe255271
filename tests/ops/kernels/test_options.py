"""The precision of fp32 products follows torch's settings, whichever of the two ways a user has set them."""

import subprocess
import sys

import pytest
import torch

from dora_peft.ops.kernels import options
from dora_peft.ops.kernels.options import EXACT_FP32, precision

MATMUL = "torch.backends.cuda.matmul"
SETTINGS = {
    "pass": EXACT_FP32,
    f"{MATMUL}.allow_tf32 = True": "tf32",
    f"{MATMUL}.allow_tf32 = True; {MATMUL}.allow_tf32 = False": EXACT_FP32,
    "torch.set_float32_matmul_precision('high')": "tf32",
}
# since torch 2.9
NEWER_SETTINGS = {
    f"{MATMUL}.fp32_precision = 'tf32'": "tf32",
    f"{MATMUL}.fp32_precision = 'ieee'": EXACT_FP32,
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    f"{MATMUL}.allow_tf32 = True; {MATMUL}.fp32_precision = 'ieee'": EXACT_FP32,
    f"{MATMUL}.fp32_precision = 'ieee'; {MATMUL}.allow_tf32 = True": "tf32",
}
# Some settings of a process cannot be taken back, so each is set in a process of its own.
PROGRAM = """
import importlib.util, os, sys, torch
spec = importlib.util.spec_from_file_location("options", sys.argv[1])
options = sys.modules["options"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(options)
for setting in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        exec(setting)
        print(*(options.precision(d) for d in (torch.float32, torch.bfloat16, torch.float16)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_it_follows_whichever_setting_was_used_last():
    settings = SETTINGS | (NEWER_SETTINGS if hasattr(torch.backends.cuda.matmul, "fp32_precision") else {})
    command = [sys.executable, "-c", PROGRAM, options.__file__, *settings]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = [line.split() for line in run.stdout.splitlines()]
    assert dict(zip(settings, (fp32 for fp32, *_ in said), strict=True)) == settings
    # tf32 is for fp32 alone
    assert all(others == ["ieee", "ieee"] for _, *others in said)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_torch_with_the_older_setting_alone(monkeypatch, allowed):
    class Older:
        allow_tf32 = allowed

    monkeypatch.setattr(torch.backends.cuda, "matmul", Older())
    assert precision(torch.float32) == ("tf32" if allowed else EXACT_FP32)
