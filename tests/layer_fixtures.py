"""Layers of every kind with a perturbed adapter, and the truth about them from the dense reference."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig, reference

KINDS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear-no-bias": lambda: nn.Linear(12, 10, bias=False),
    "Conv1D": lambda: Conv1D(10, 12),
    "embedding": lambda: nn.Embedding(12, 10),
    "embedding-padding": lambda: nn.Embedding(12, 10, padding_idx=3),
    "embedding-scaled": lambda: Gemma3TextScaledWordEmbedding(12, 10, 0, embed_scale=10**0.5),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
    "conv2d-no-bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "conv2d-pointwise": lambda: nn.Conv2d(4, 6, 1),
    "conv2d-dilated": lambda: nn.Conv2d(4, 6, 2, dilation=2),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "conv1d-grouped": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d-grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"),
    "conv2d-depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv3d-grouped": lambda: nn.Conv3d(4, 6, 2, groups=2),
}
MERGEABLE = [kind for kind in KINDS if "grouped" not in kind and "depthwise" not in kind]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# what a result may be off beyond twice the naive path's own error, relative to its norm
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def expected_warning(layer):
    """PEFT's layers say of a grouped convolution that it cannot be merged."""
    if getattr(layer, "groups", 1) > 1:
        return pytest.warns(UserWarning, match="groups > 1")
    return nullcontext()


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def adapted(kind, dtype=torch.float32, *, bias=True, **options):
    """A model of one layer of this kind with a DoRA adapter whose A, B and m are all away from their initial values."""
    torch.manual_seed(0)
    layer = KINDS[kind]() if isinstance(kind, str) else kind
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    config = DoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": ["layer"], **options})
    with expected_warning(layer):
        model = get_peft_model(One(layer.to(dtype)), config)
    perturb(model.base_model.model.layer, "default")
    return model


@torch.no_grad()
def perturb(layer, adapter, seed=0):
    generator = seeded(seed)
    lora_A, lora_B = layer.factor_parameters(adapter)
    magnitude = layer.lora_magnitude_vector[adapter].weight
    lora_A.copy_(torch.randn(lora_A.shape, generator=generator) / lora_A[0].numel() ** 0.5)
    if not layer.magnitude_only[adapter]:
        lora_B.copy_(torch.randn(lora_B.shape, generator=generator))
    else:
        lora_A.zero_()
    magnitude.mul_(torch.rand(magnitude.shape, generator=generator) + 0.5)


def with_two_adapters(kind, dtype=torch.float64, **options):
    model = adapted(kind, dtype, **options)
    with expected_warning(base_of(model)):
        model.add_adapter(
            "second", DoraConfig(r=4 if kind == "conv2d-depthwise" else 2, target_modules=["layer"], **options)
        )
    perturb(dora(model), "second", seed=7)
    # PEFT creates adapters of float64 layers in fp32
    if dtype == torch.float64:
        model.double()
    return model


def dora(model):
    return model.base_model.model.layer


def base_of(model):
    return dora(model).get_base_layer()


def example(model, *, batch=3, grad=True):
    """An input of the layer's kind, in the dtype of its weight."""
    base, generator = base_of(model), seeded(1)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (batch, 5), generator=generator)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = (batch, base.in_channels, *[6] * len(base.kernel_size))
    else:
        shape = (batch, 5, 12)
    return torch.randn(shape, generator=generator).to(base.weight.dtype).requires_grad_(grad)


def block_diagonal(B, groups):
    """B [out, r / groups] over the ranks of its own group only: [out, r]."""
    per_group = B.shape[0] // groups
    blocks = [B[g * per_group : (g + 1) * per_group] for g in range(groups)]
    return torch.cat(
        [torch.cat([torch.zeros_like(b) if i != g else b for i in range(groups)], dim=1) for g, b in enumerate(blocks)]
    )


def dense_base(base, weight):
    """W0 as a [out, in] matrix; a grouped kernel over all input channels."""
    if isinstance(base, (nn.Embedding, Conv1D)):
        return weight.T
    if getattr(base, "groups", 1) == 1:
        return weight.flatten(1)
    out, per_group = weight.shape[:2]
    dense = weight.new_zeros(out, base.in_channels, *weight.shape[2:])
    for j in range(out):
        first = j // (out // base.groups) * per_group
        dense[j, first : first + per_group] = weight[j]
    return dense.flatten(1)


def map_with(base, x, matrix, bias):
    """What the base layer computes, with another matrix."""
    if isinstance(base, nn.Embedding):
        out = F.embedding(x, matrix.T)
        return out * base.embed_scale.to(out.dtype) if hasattr(base, "embed_scale") else out
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
        kernel = matrix.view(base.out_channels, base.in_channels, *base.kernel_size)
        return conv(x, kernel, bias, base.stride, base.padding, base.dilation)
    return F.linear(x, matrix, bias)


def constant_column(A, padding_idx):
    """A whose lookup gives the padding row no gradient, as nn.Embedding's does; its norm still depends on it."""
    if padding_idx is None:
        return A
    column = torch.arange(A.shape[1]) == padding_idx
    return torch.where(column, A.detach(), A)


class Truth:
    """A layer's output and gradients through the dense reference, every operation in `dtype`."""

    def __init__(self, model, x, *, dtype=torch.float64, detach=True, tied=None, adapters=("default",)):
        layer, base = dora(model), base_of(model)

        def leaf(tensor):
            return tensor.detach().to(dtype).clone().requires_grad_()

        self.x = leaf(x) if x.is_floating_point() else x
        matrix = original = dense_base(base, layer.original_weight().detach().to(dtype))
        bias = getattr(base, "bias", None)
        bias = None if bias is None else bias.detach().to(dtype)
        self.parameters = {}
        for adapter in adapters:
            stored = (*layer.factor_parameters(adapter), layer.lora_magnitude_vector[adapter].weight)
            A, B, m = self.parameters[adapter] = tuple(leaf(tensor) for tensor in stored)
            A, B, s = A.flatten(1), B.flatten(1), layer.scaling[adapter]
            if getattr(base, "groups", 1) > 1:
                B = block_diagonal(B, base.groups)
            norm = reference.weight_norm(original, A, B, s)
            c = reference.scale(m.flatten(), norm.detach() if detach else norm, tied)
            matrix = c[:, None] * (matrix + s * B @ constant_column(A, getattr(base, "padding_idx", None)))
        self.matrix = matrix
        self.y = map_with(base, self.x, matrix, bias)

    def gradients(self, probe):
        """By name, of the sum of y * probe."""
        leaves = {"x": self.x} if self.x.is_floating_point() else {}
        for adapter, tensors in self.parameters.items():
            leaves |= {f"{adapter}.{name}": tensor for name, tensor in zip("ABm", tensors, strict=True)}
        found = torch.autograd.grad(self.y, list(leaves.values()), probe.to(self.y.dtype), allow_unused=True)
        return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def found_gradients(model, x, y, probe, adapters=("default",)):
    layer = dora(model)
    leaves = {"x": x} if x.requires_grad else {}
    for adapter in adapters:
        stored = (*layer.factor_parameters(adapter), layer.lora_magnitude_vector[adapter].weight)
        leaves |= {f"{adapter}.{name}": p for name, p in zip("ABm", stored, strict=True) if p.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), probe)
    return dict(zip(leaves, grads, strict=True))


def distance(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(model, x, *, adapters=("default",), detach=True, tied=None, forward=None):
    """Forward and all gradients against the reference in float64, allowing what the reference itself errs in the
    layer's dtype."""
    y = (forward or model)(x)
    dtype = base_of(model).weight.dtype
    assert y.dtype == dtype
    probe = torch.randn(y.shape, generator=seeded(2)).to(dtype)
    options = {"adapters": adapters, "detach": detach, "tied": tied}
    truth, naive = Truth(model, x, **options), Truth(model, x, dtype=dtype, **options)
    allowed = 2 * distance(naive.y, truth.y) + FLOOR[dtype]
    assert distance(y, truth.y) <= allowed
    found = found_gradients(model, x, y, probe, adapters)
    expected, naive_gradients = (t.gradients(probe) for t in (truth, naive))
    assert found.keys() <= expected.keys()
    for name, grad in found.items():
        allowed = 2 * distance(naive_gradients[name], expected[name]) + FLOOR[dtype]
        assert distance(grad, expected[name]) <= allowed, name
    return found
