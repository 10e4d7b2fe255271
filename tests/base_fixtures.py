"""Base layers of every kind with the dense [out, in] matrix that each stands for."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.requires_grad_(False)


def conv_matrix(layer):
    """The kernel over all input channels, zero outside a row's own group: [out, in_channels * prod(kernel)]."""
    out, per_group = layer.weight.shape[:2]
    dense = torch.zeros(out, layer.in_channels, *layer.weight.shape[2:], dtype=torch.float64)
    for j in range(out):
        first = j // (out // layer.groups) * per_group
        dense[j, first : first + per_group] = layer.weight[j].double()
    return dense.flatten(1)


def four_bit(width, out, quant_type, nested, **options):
    layer = bnb.nn.Linear4bit(width, out, quant_type=quant_type, compress_statistics=nested, **options)
    layer.load_state_dict(randomised(nn.Linear(width, out, bias=options.get("bias", True))).state_dict())
    return layer.to("cpu")


def eight_bit(width, out):
    layer = bnb.nn.Linear8bitLt(width, out, has_fp16_weights=False)
    layer.load_state_dict(randomised(nn.Linear(width, out)).state_dict())
    return layer.to("cpu")


def four_bit_matrix(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def eight_bit_matrix(layer):
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.double() * scale.double()[:, None] / 127


class MapsOnly(nn.Module):
    """A linear map whose weight cannot be read, like a layer of a library with its own packed format."""

    def __init__(self, width, out, bias=True, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features = width, out
        self.qweight = nn.Parameter(torch.randint(-100, 100, (out, width), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.rand(out).to(dtype))
        self.bias = nn.Parameter(torch.randn(out).to(dtype), requires_grad=False) if bias else None

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales[:, None], self.bias)


def linear_matrix(layer):
    return layer.weight.double()


def transposed_matrix(layer):
    return layer.weight.double().T


DENSE = {
    "linear": (lambda: nn.Linear(11, 7), linear_matrix),
    "linear-fp64": (lambda: nn.Linear(11, 7, dtype=torch.float64), linear_matrix),
    "linear-bf16": (lambda: nn.Linear(11, 7).bfloat16(), linear_matrix),
    "linear-fp16": (lambda: nn.Linear(11, 7).half(), linear_matrix),
    "linear-1x1": (lambda: nn.Linear(1, 1), linear_matrix),
    "conv1D": (lambda: Conv1D(7, 11), transposed_matrix),
    "conv1D-bf16": (lambda: Conv1D(7, 11).bfloat16(), transposed_matrix),
    "embedding": (lambda: nn.Embedding(23, 5), transposed_matrix),
    "embedding-bf16": (lambda: nn.Embedding(23, 5).bfloat16(), transposed_matrix),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), conv_matrix),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), conv_matrix),
    "conv2d-bf16": (lambda: nn.Conv2d(4, 6, 3).bfloat16(), conv_matrix),
    "conv2d-pointwise": (lambda: nn.Conv2d(4, 6, 1), conv_matrix),
    "conv2d-channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), conv_matrix),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), conv_matrix),
}
GROUPED = {
    "conv1d-grouped": (lambda: nn.Conv1d(6, 4, 3, groups=2), conv_matrix),
    "conv2d-grouped": (lambda: nn.Conv2d(6, 9, (3, 2), groups=3), conv_matrix),
    "conv2d-grouped-bf16": (lambda: nn.Conv2d(6, 9, 2, groups=3).bfloat16(), conv_matrix),
    "conv2d-depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5), conv_matrix),
    "conv3d-grouped": (lambda: nn.Conv3d(4, 4, 2, groups=2), conv_matrix),
}
QUANTISED = {
    "int8": (lambda: eight_bit(40, 24), eight_bit_matrix),
    **{
        f"{kind}{'-nested' * nested}-{width}x{out}": (
            lambda kind=kind, nested=nested, width=width, out=out: four_bit(width, out, kind, nested),
            four_bit_matrix,
        )
        for kind in ("nf4", "fp4")
        for nested in (False, True)
        # whole quantisation blocks per row; blocks across rows; a last block that is not full; an odd number of values
        for width, out in ((128, 32), (40, 24), (200, 7), (13, 5))
    },
    "nf4-blocksize128": (lambda: four_bit(96, 20, "nf4", False, blocksize=128), four_bit_matrix),
    "nf4-bf16-storage": (
        lambda: four_bit(64, 32, "nf4", True, quant_storage=torch.bfloat16, compute_dtype=torch.bfloat16),
        four_bit_matrix,
    ),
}
if bnb is None:
    QUANTISED = {}
elif "blocksize" not in bnb.nn.Linear4bit.__init__.__code__.co_varnames:
    del QUANTISED["nf4-blocksize128"]
OPAQUE = {
    "opaque": (lambda: MapsOnly(11, 7), lambda layer: layer.qweight.double() * layer.scales.double()[:, None]),
    "opaque-no-bias": (
        lambda: MapsOnly(11, 7, bias=False),
        lambda layer: layer.qweight.double() * layer.scales.double()[:, None],
    ),
}
WITH_ROWS = {**DENSE, **GROUPED, **QUANTISED}
ALL = {**WITH_ROWS, **OPAQUE}


def build(kind):
    torch.manual_seed(0)
    make, matrix = ALL[kind]
    layer = make()
    if kind in DENSE or kind in GROUPED:
        randomised(layer)
    return layer, matrix(layer)


def close(found, expected):
    """Against sums in float64, with the accumulation dtype's own rounding."""
    assert found.dtype in (torch.float32, torch.float64)
    rtol, atol = (1e-12, 1e-12) if found.dtype == torch.float64 else (1e-5, 1e-5 * expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
