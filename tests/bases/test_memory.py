"""Reading a base weight needs little memory beside it."""

import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from dora_peft.bases import base_weight
from dora_peft.ops import norm

bnb = pytest.importorskip("bitsandbytes")
MIB = 2**20


class LivePeak(TorchDispatchMode):
    """The peak of the memory that operators allocated inside the mode and that is still referenced, in bytes."""

    def __init__(self, *existing):
        super().__init__()
        self.existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.existing:
                self._count(tensor)
        return out

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        users = self.live.setdefault(pointer, [size, 0])
        users[1] += 1
        weakref.finalize(tensor, self._release, pointer)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))

    def _release(self, pointer):
        self.live[pointer][1] -= 1
        if self.live[pointer][1] == 0:
            del self.live[pointer]


@contextmanager
def transient_below(limit, *existing):
    with torch.no_grad(), LivePeak(*existing) as seen:
        yield seen
    assert 0 < seen.peak <= limit


def test_live_peak_sees_a_dense_temporary():
    weight = torch.zeros(1024, 1024)
    with pytest.raises(AssertionError), transient_below(4 * MIB - 1, weight):
        weight + 1
    with transient_below(4 * MIB, weight):
        for _ in range(3):
            weight + 1


def refresh(layer, A, B):
    weight = base_weight(layer, "layer")
    squared = weight.row_norms_squared()
    norm.row_norms(weight, squared, A, B, 1.0)
    norm.factored_norm_squared(weight, squared, A, B, 1.0)
    weight.vjp(B)


def big_layers():
    """Layers of 8192 x 8192, 128 MiB in bf16; their zeros take no memory until they are read."""
    bf16, full, transposed = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), Conv1D(1, 1)
    for layer, dtype in ((bf16, torch.bfloat16), (full, torch.float32), (transposed, torch.bfloat16)):
        layer.weight = nn.Parameter(torch.zeros(8192, 8192, dtype=dtype), requires_grad=False)
    return {"bf16": bf16, "fp32": full, "Conv1D bf16": transposed}


@pytest.mark.parametrize("cancelling", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "Conv1D bf16"])
def test_a_refresh_needs_little_memory(kind, cancelling, monkeypatch):
    # no sum is accepted: every row is computed densely
    if cancelling:
        monkeypatch.setattr(norm, "CANCELLATION", math.inf)
    layer = big_layers()[kind]
    A, B = torch.ones(4, 8192), torch.ones(8192, 4)
    with transient_below(64 * MIB, layer.weight):
        refresh(layer, A, B)


def test_a_refresh_of_a_quantised_layer_needs_little_memory():
    state = bnb.functional.quantize_4bit(torch.zeros(4096, 64), quant_type="nf4")[1]
    layer = bnb.nn.Linear4bit(8192, 4096, bias=False, quant_type="nf4")
    state.shape, state.absmax = torch.Size((4096, 8192)), torch.zeros(4096 * 8192 // 64)
    packed = torch.zeros(4096 * 8192 // 2, 1, dtype=torch.uint8)
    layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    A, B = torch.ones(4, 8192), torch.ones(4096, 4)
    with transient_below(64 * MIB, packed, state.absmax):
        refresh(layer, A, B)


def test_a_refresh_of_an_int8_layer_needs_little_memory():
    layer = bnb.nn.Linear8bitLt(8192, 4096, bias=False, has_fp16_weights=False)
    packed, scale = torch.zeros(4096, 8192, dtype=torch.int8), torch.zeros(4096)
    layer.weight = bnb.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scale)
    A, B = torch.ones(4, 8192), torch.ones(4096, 4)
    with transient_below(64 * MIB, packed, scale):
        refresh(layer, A, B)
