"""Base layers known by their forward alone: read without their bias, left as they are, checked in all their parts."""

import pytest
import torch
import torch.nn.functional as F
from base_fixtures import MapsOnly, build, close
from peft import PeftModel, get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.bases import base_weight, opaque
from dora_peft.bases.input_gradient import gives_gradient
from dora_peft.bases.inspection import linear_map, parts

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")


class CastsItsScales(nn.Module):
    """A linear map kept in 4 bits that computes in the dtype of x, fp16 for fp32, and casts its scales to it for good.

    As some libraries do, whatever dtype they were made for: bf16 scales do not come back from fp16 ones.
    """

    def __init__(self, width, bias=0.1, out=None):
        super().__init__()
        self.in_features, self.out_features = width, out or width
        self.compute_dtype = torch.float16
        self.register_buffer("qweight", torch.randint(-8, 8, (self.out_features, width), dtype=torch.int8))
        self.register_buffer("scales", (0.01 + 0.01 * torch.rand(self.out_features, 1)).half())
        self.register_buffer("bias", None if bias is None else (bias * torch.randn(self.out_features)).half())

    def matrix(self):
        return self.qweight.double() * self.scales.double()

    def forward(self, x):
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self.scales = self.scales.to(dtype)
        if self.bias is not None:
            self.bias = self.bias.to(dtype)
        out = F.linear(x.to(dtype), self.qweight.to(dtype) * self.scales)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def model_of(width=32, **options):
    torch.manual_seed(0)
    return nn.Sequential(CastsItsScales(width, **options), nn.Tanh(), CastsItsScales(width, **options))


CONFIG = {"r": 2, "target_modules": ["0", "2"]}


@pytest.mark.parametrize("bias", [None, 0.1, 300.0])
def test_the_weight_is_read_without_the_bias(bias):
    """At |b| = 300 an fp16 output has lost all of the weight."""
    torch.manual_seed(0)
    layer = CastsItsScales(48, bias, out=40)
    seam, matrix = base_weight(layer, "layer"), layer.matrix()
    torch.testing.assert_close(seam.row_norms_squared().double(), matrix.square().sum(1), rtol=2e-3, atol=0)
    A, g = torch.randn(3, 48), torch.randn(40, 3)
    torch.testing.assert_close(seam.times(A).double(), matrix @ A.double().T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(seam.vjp(g).double(), g.double().T @ matrix, rtol=1e-2, atol=1e-2)
    assert gives_gradient(layer)


def test_reading_leaves_the_layer_as_it_is():
    layer = CastsItsScales(8)
    layer(torch.randn(2, 8, dtype=torch.bfloat16))
    before = dict(layer.named_buffers())
    base_weight(layer, "layer").row_norms_squared()
    assert gives_gradient(layer)
    assert all(tensor is before[name] for name, tensor in layer.named_buffers())
    assert layer.scales.dtype == torch.bfloat16


class AddsItsBiasItself(CastsItsScales):
    """Keeps what it adds under another name as well."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("offset", self.bias)

    def forward(self, x):
        bias, self.bias = self.bias, None
        out = super().forward(x) + self.offset.to(x.dtype)
        self.bias = bias
        return out


def hooked(width):
    layer = CastsItsScales(width)
    layer.register_forward_hook(lambda *_: None)
    return layer


def own_forward(width):
    layer = CastsItsScales(width)
    layer.forward = layer.forward
    return layer


def plain_attribute(width):
    layer = CastsItsScales(width)
    bias = layer.bias
    del layer.bias
    object.__setattr__(layer, "bias", bias.float())
    return layer


@pytest.mark.parametrize("make", [AddsItsBiasItself, hooked, own_forward, plain_attribute])
def test_the_bias_is_subtracted_where_the_layer_cannot_do_without(make):
    torch.manual_seed(0)
    layer = make(16)
    module, bias = linear_map(layer, torch.zeros(1, 16, dtype=torch.float16))
    assert module is layer
    assert bias is layer.bias
    seam = base_weight(layer, "layer")
    torch.testing.assert_close(seam.row_norms_squared().double(), layer.matrix().square().sum(1), rtol=1e-2, atol=1e-4)


def test_a_compiled_call_is_not_taken_for_the_twins():
    layer = CastsItsScales(16, 300.0)
    # as Module.compile() sets it, bound to the layer
    layer._compiled_call_impl = layer._call_impl
    squared = base_weight(layer, "layer").row_norms_squared().double()
    torch.testing.assert_close(squared, layer.matrix().square().sum(1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_reloaded_adapter_gives_the_same_outputs(dtype, low_cpu_mem_usage, tmp_path):
    """The scales' dtype, and with it W0, differs before and after the first call in bf16."""
    model = get_peft_model(model_of(), DoraConfig(**CONFIG))
    x = torch.randn(6, 32).to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    first = None
    for _ in range(3):
        loss = model(x).float().square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_first_call_computes_what_the_others_do():
    model = get_peft_model(model_of(bias=3.0), DoraConfig(init_lora_weights=False, **CONFIG))
    x = torch.randn(6, 32, dtype=torch.bfloat16)
    assert torch.equal(model(x), model(x))


@pytest.mark.cached_norms
def test_the_norm_follows_the_scales():
    model = get_peft_model(nn.Sequential(CastsItsScales(32)), DoraConfig(r=2, target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(4, 32, dtype=torch.float16)
    with torch.no_grad():
        before = model(x) - layer.get_base_layer().bias
        # the same direction, of twice the length: m alone decides
        layer.get_base_layer().scales.mul_(2)
        after = model(x) - layer.get_base_layer().bias
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["opaque", "opaque-no-bias"])
def test_opaque_weights_are_read_in_blocks_of_columns(kind, monkeypatch):
    monkeypatch.setattr(opaque, "BLOCK_BYTES", 4 * 11 * 3)
    layer, matrix = build(kind)
    calls = []
    layer.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    weight = base_weight(layer, "layer")
    assert not weight.has_rows
    assert not weight.mergeable
    close(weight.row_norms_squared(), matrix.square().sum(1))
    assert calls == [3, 3, 3, 2]


def test_opaque_weights_of_low_precision_are_called_in_it():
    layer = MapsOnly(11, 7, dtype=torch.bfloat16)
    dtypes = set()
    layer.register_forward_hook(lambda module, args, out: dtypes.add(args[0].dtype))
    found = base_weight(layer, "layer").times(torch.eye(11))
    assert dtypes == {torch.bfloat16}
    assert found.dtype == torch.float32
    matrix = (layer.qweight.bfloat16() * layer.scales[:, None]).float()
    torch.testing.assert_close(found, matrix, rtol=2e-2, atol=2e-2 * matrix.abs().max().item())


def test_which_tensors_are_parts():
    layer = CastsItsScales(8)
    assert [id(tensor) for tensor in parts(layer)] == [id(layer.scales)]
    assert parts(nn.Linear(2, 2)) is None


class QuantisesAtEachCall(nn.Linear):
    """Before it is frozen: a float weight, quantised in each forward pass."""

    @property
    def qweight(self):
        return torch.round(self.weight * 50) / 50

    def forward(self, x):
        return F.linear(x, self.qweight, self.bias)


def test_a_float_weight_that_is_quantised_at_each_call():
    torch.manual_seed(0)
    layer = QuantisesAtEachCall(16, 12).requires_grad_(False)
    matrix = layer.qweight.double()
    seam = base_weight(layer, "layer")
    torch.testing.assert_close(seam.row_norms_squared().double(), matrix.square().sum(1), rtol=1e-5, atol=0)
    assert not seam.mergeable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gptqmodel_awq(dtype, tmp_path):
    awq = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")

    def make():
        torch.manual_seed(0)
        blocks = []
        for _ in range(2):
            dense = nn.Linear(64, 64, dtype=torch.float16)
            options = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "register_buffers": False}
            layer = awq.AwqTorchLinear(in_features=64, out_features=64, bias=True, **options)
            groups = dense.weight.data.float().view(64, 2, 32)
            scales = (groups.amax(-1) - groups.amin(-1)) / 15
            layer.pack(dense, scales.half(), torch.round(-groups.amin(-1) / scales))
            layer.post_init()
            blocks.append(layer)
        return nn.Sequential(blocks[0], nn.Tanh(), blocks[1])

    model = get_peft_model(make(), DoraConfig(**CONFIG, init_lora_weights=False))
    x = torch.randn(6, 64).to(dtype)
    model(x).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    with pytest.raises(NotImplementedError, match="AwqTorchLinear"):
        model.merge_adapter()


@pytest.mark.parametrize("frozen", [False, True])
def test_quanto(frozen):
    quanto = pytest.importorskip("optimum.quanto")
    net = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 16))
    quanto.quantize(net, weights=quanto.qint8)
    if frozen:
        quanto.freeze(net)
    matrices = [(layer.weight if frozen else layer.qweight).dequantize().detach() for layer in net]
    model = get_peft_model(net, DoraConfig(r=2, target_modules=["0", "1"]))
    x = torch.randn(5, 32, requires_grad=True)
    out = model(x)
    expected = (x @ matrices[0].T + net[0].bias) @ matrices[1].T + net[1].bias
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(dx, (matrices[1].sum(0) @ matrices[0]).expand(5, 32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_hqq(bits):
    quantize = pytest.importorskip("hqq.core.quantize")
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    net = nn.Sequential(*(quantize.HQQLinear(nn.Linear(64, 64), config, **options) for _ in range(2)))
    model = get_peft_model(net, DoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    layer, x = model.base_model.model[0], torch.randn(5, 64, requires_grad=True)
    base = layer.get_base_layer()
    A, B = layer.factors("default")
    W = base.dequantize()
    c = layer.magnitude("default") / (W + layer.scaling["default"] * B @ A).norm(dim=1)
    expected = c * (x @ (W + layer.scaling["default"] * B @ A).T) + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (layer(x), expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="HQQLinear"):
        model.merge_adapter()
