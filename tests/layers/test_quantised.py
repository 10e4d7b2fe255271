"""Layers over bitsandbytes' 4- and 8-bit weights."""

import pytest
import torch
from layer_fixtures import (
    adapted,
    base_of,
    distance,
    dora,
    found_gradients,
)
from peft import get_peft_model
from quantised_fixtures import quantised
from torch import nn

from dora_peft import DoraConfig


@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_forward_and_gradients(nested):
    model = quantised(4, compress_statistics=nested)
    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.functional.dequantize_4bit(base_of(model).weight.data, base_of(model).weight.quant_state)
    dense = adapted(nn.Linear(64, 32))
    with torch.no_grad():
        base_of(dense).weight.copy_(weight)
        base_of(dense).bias.copy_(base_of(model).bias)
        for target, source in zip(
            (*dora(dense).factor_parameters("default"), dora(dense).lora_magnitude_vector["default"].weight),
            (*dora(model).factor_parameters("default"), dora(model).lora_magnitude_vector["default"].weight),
            strict=True,
        ):
            target.copy_(source)
    x = torch.randn(5, 64, requires_grad=True)
    probe = torch.randn(5, 32)
    outputs = [m(x) for m in (model, dense)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    found = [found_gradients(m, x, y, probe) for m, y in zip((model, dense), outputs, strict=True)]
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_evaluation_between_training_steps(nested):
    """An evaluation repacks the weight on CPUs with AVX512-BF16; what follows must not multiply a mixture."""
    model = quantised(4, compress_statistics=nested)
    x = torch.randn(3, 64)
    expected = model.train()(x).detach()
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            # bf16 products
            assert distance(model(x), expected.double()) < 0.02
            # the next use reads the weight again
            dora(model)._norms.clear()
    assert distance(model.train()(x).detach(), expected.double()) < 0.02
    model.eval().merge_adapter()
    model.unmerge_adapter()
    with torch.no_grad():
        assert distance(model(x), expected.double()) < 0.02


def test_four_bit_base_trains_after_an_evaluation():
    # an evaluation may repack the 4-bit weight (AVX512-BF16), and bitsandbytes has no input gradient for that form
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    model = get_peft_model(nn.Sequential(base), DoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(5, 64, requires_grad=True)
    before = torch.autograd.grad(model.train()(x).sum(), x)[0]
    with torch.no_grad():
        model.eval()(x.detach())
    after = torch.autograd.grad(model.train()(x).sum(), x)[0]
    # the statistics went through bf16
    torch.testing.assert_close(after, before, rtol=2**-6, atol=2**-6 * before.abs().max().item())
