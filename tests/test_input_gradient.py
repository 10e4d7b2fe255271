"""A base layer that gives no correct gradient for its input is noticed, and gets the one over its weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_peft.base_weight import base_weight
from dora_peft.input_gradient import call, gives_gradient


class Packed(nn.Module):
    """A linear map kept as int8, with quantised activations or not."""

    def __init__(self, how, bias=True, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features, self.how = 16, 12, how
        self.register_buffer("qweight", torch.randint(-100, 100, (12, 16), dtype=torch.int8))
        self.register_buffer("scales", (0.01 * torch.rand(12, 1)).to(dtype))
        self.bias = nn.Parameter(torch.randn(12, dtype=dtype), requires_grad=False) if bias else None

    def matrix(self):
        return self.qweight.double() * self.scales.double()

    def forward(self, x):
        weight = self.qweight.to(x.dtype) * self.scales.to(x.dtype)
        if self.how == "detached":
            x = x.detach()
        elif self.how == "rounded":  # has a derivative, which is 0
            step = x.abs().amax(-1, keepdim=True).detach() / 127
            x = torch.round(x / step) * step
        elif self.how == "halved":
            x = 0.5 * x + 0.5 * x.detach()
        return F.linear(x, weight, self.bias)


WRONG = ["detached", "rounded", "halved"]


@pytest.mark.parametrize("trained_bias", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["right", *WRONG])
def test_which_layers_give_a_gradient(how, bias, trained_bias):
    layer = Packed(how, bias)
    if bias:
        layer.bias.requires_grad_(trained_bias)  # the output requires a gradient then, x gets none all the same
    assert gives_gradient(layer) == (how == "right")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_plain_layers_are_not_called(dtype):
    layer = nn.Linear(3, 4, dtype=dtype)
    layer.forward = None
    assert gives_gradient(layer)


def test_trying_leaves_no_trace():
    layer = Packed("right")
    state, seen = torch.get_rng_state(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert gives_gradient(layer)
        assert gives_gradient(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize("how", ["right", *WRONG])
def test_the_gradient_is_that_over_the_weight(how, shape):
    layer = Packed(how)
    layer.bias.requires_grad_()
    x = torch.randn(shape, requires_grad=True)
    out = call(layer, lambda: base_weight(layer, "layer"), x)
    assert torch.equal(out, layer(x.detach()))
    g = torch.randn_like(out)
    dx, db = torch.autograd.grad(out, (x, layer.bias), g)
    torch.testing.assert_close(dx, (g.double() @ layer.matrix()).float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(db, g.reshape(-1, 12).sum(0))


def test_nothing_is_added_where_no_gradient_is_asked_for():
    layer = Packed("detached")
    assert not call(layer, None, torch.randn(2, 16)).requires_grad
    with torch.no_grad():
        assert not call(layer, None, torch.randn(2, 16, requires_grad=True)).requires_grad


@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"])
def test_torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(net, getattr(quantization, name)())
    layer = net[0]
    assert gives_gradient(layer) == (name == "Int8WeightOnlyConfig")
    x = torch.randn(5, 64, requires_grad=True)
    out = call(layer, lambda: base_weight(layer, "layer"), x)
    g = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, g)
    torch.testing.assert_close(dx, g @ layer.weight.dequantize(), rtol=1e-4, atol=1e-4)


def test_torchao_nf4_is_read_by_its_forward():
    """Its `dequantize` takes other arguments than torchao's other tensors' does."""
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(256, 128)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 256), requires_grad=False)
    weight = layer.weight.get_original_weight()
    seam = base_weight(layer, "layer")
    assert not seam.has_rows
    torch.testing.assert_close(seam.row_norms_squared(), weight.square().sum(1), rtol=1e-4, atol=1e-4)
    A = torch.randn(3, 256)
    torch.testing.assert_close(seam.times(A), weight @ A.T, rtol=1e-4, atol=1e-4)
