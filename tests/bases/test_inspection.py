"""What is found out about a base layer: whether all of it is here, and the dtype that it computes in."""

import pytest
import torch
from base_fixtures import MapsOnly
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig, DoraLayer
from dora_peft.bases import base_weight


class Computes(MapsOnly):
    """Keeps its scales in fp16 and computes in another dtype, as AWQ's layers do in a bf16 model."""

    def __init__(self, takes, computes=None):
        super().__init__(11, 7, dtype=torch.float16)
        self.takes, self.computes = takes, computes

    def forward(self, x):
        if x.dtype not in self.takes:
            raise RuntimeError(f"expected one of {self.takes}, found {x.dtype}")
        dtype = self.computes or x.dtype
        return nn.functional.linear(x.to(dtype), (self.qweight.to(dtype) * self.scales[:, None].to(dtype)))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("takes", "computes", "expected"),
    [
        ([BF16], None, BF16),
        ([FP16], None, FP16),
        ([FP16, BF16], None, BF16),
        ([FP32, FP16, BF16], None, FP32),
        ([FP32, FP16, BF16], FP16, FP16),
        ([FP32, FP16, BF16], BF16, BF16),
        ([], None, FP16),
    ],
)
def test_the_dtype_that_an_opaque_layer_computes_in(takes, computes, expected):
    layer = Computes(takes, computes)
    layer.bias = None
    assert base_weight(layer, "layer").compute_dtype == expected
    layer.dtype = FP16
    assert base_weight(layer, "layer").compute_dtype == FP16
    layer.compute_dtype = BF16
    assert base_weight(layer, "layer").compute_dtype == BF16


def test_an_opaque_layer_is_read_alike_before_and_after_it_casts_its_scales():
    """Some libraries cast them at the first call; a norm taken before has to be the one after a reload."""
    layer = Computes([FP32, FP16, BF16])
    layer.bias = None
    before = base_weight(layer, "layer").row_norms_squared()
    layer.scales = layer.scales.float()
    torch.testing.assert_close(base_weight(layer, "layer").row_norms_squared(), before, rtol=1e-6, atol=0)


def partitioned(layer):
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_id = 3
    return layer


def sharded(layer):
    layer.weight = nn.Parameter(layer.weight.detach())
    layer.weight.device_mesh, layer.weight.placements = "mesh", "(Shard(dim=0),)"
    return layer


@pytest.mark.parametrize(("make", "found"), [(partitioned, "ZeRO-3"), (sharded, "sharded one")])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(4, 5), lambda: nn.Embedding(4, 5), lambda: nn.Conv1d(4, 5, 3)])
def test_a_part_of_a_weight_is_refused_at_creation(kind, make, found):
    model = nn.Sequential(nn.Tanh(), make(kind()))
    with pytest.raises(ValueError, match=rf"module '1'.*whole weight.*{found}.*Create the adapter before"):
        get_peft_model(model, DoraConfig(r=2, target_modules=["1"]))
    assert not isinstance(model[1], DoraLayer)


def test_tensor_parallel_weights_are_refused(tmp_path):
    """As transformers' tp_plan distributes them: part of each weight is in each process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(8, 6))
        sharded = distribute_tensor(net[0].weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        net[0].weight = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(ValueError, match=r"'0' \(Linear\).*sharded one \(DTensor \(6, 8\).*without tp_plan"):
            get_peft_model(net, DoraConfig(r=2, target_modules=["0"]))
    finally:
        distributed.destroy_process_group()
