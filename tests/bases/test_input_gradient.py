"""A base layer that gives no correct gradient for its input is noticed, and gets the one over its weight."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_peft import DoraConfig
from dora_peft.bases import base_weight
from dora_peft.bases.input_gradient import call, gives_gradient


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
        # has a derivative, which is 0
        elif self.how == "rounded":
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
        # the output requires a gradient then, x gets none all the same
        layer.bias.requires_grad_(trained_bias)
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


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", WRONG)
def test_layers_below_train_with_the_gradient_over_the_weight(how, checkpointing):
    """As if the base's activations were not quantised in backward; PEFT's LoRA has the same fault over such a base."""
    torch.manual_seed(0)
    # in and out are equal, so that two can be stacked
    blocks = [Packed(how) for _ in range(2)]
    for block in blocks:
        block.in_features = block.out_features = 12
        block.qweight = block.qweight[:, :12].contiguous()
    model = get_peft_model(nn.Sequential(*blocks), DoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(5, 12, requires_grad=True)
    forward = (lambda x: checkpoint(model, x, use_reentrant=False)) if checkpointing else model
    forward(x).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}

    class Exact(torch.autograd.Function):
        """The block's output with dx = g W0."""

        @staticmethod
        def forward(ctx, x, block):
            ctx.block = block
            return block.forward(x)

        @staticmethod
        def backward(ctx, g):
            return g @ ctx.block.matrix().float(), None

    leaf = x.detach().clone().requires_grad_()
    y = leaf
    leaves = {"x": leaf}
    for number, block in enumerate(blocks):
        layer = model.base_model.model[number]
        A, B, m = (
            t.detach().clone().requires_grad_()
            for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.magnitude("default"))
        )
        s, base = layer.scaling["default"], block.matrix().float()
        c = m / (base + s * B @ A).norm(dim=1).detach()
        y = c * (Exact.apply(y, block) - block.bias + s * y @ A.T @ B.T) + block.bias
        prefix = f"base_model.model.{number}."
        leaves |= {f"{prefix}lora_A.default.weight": A, f"{prefix}lora_B.default.weight": B}
        leaves[f"{prefix}lora_magnitude_vector.default.weight"] = m
    expected = dict(zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=2e-2, atol=2e-2 * expected[name].abs().max().item())


def test_a_gradient_of_the_gradient_is_refused():
    layer, x = Packed("detached"), torch.randn(3, 16, requires_grad=True)
    y = call(layer, lambda: base_weight(layer, "layer"), x)
    with pytest.raises(RuntimeError, match=r'create_graph=True.*implementation\("reference"\)'):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
