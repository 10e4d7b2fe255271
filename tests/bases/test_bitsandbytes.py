"""Weights that bitsandbytes quantised: written alike, and read right after it has changed their format."""

from contextlib import nullcontext

import pytest
import torch
from base_fixtures import ALL, QUANTISED, build, close, eight_bit, eight_bit_matrix, four_bit, four_bit_matrix
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig
from dora_peft.bases import base_weight

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("kind", QUANTISED)
def test_replacement_of_a_quantised_weight_is_quantised_alike(kind):
    layer, matrix = build(kind)
    old = layer.weight
    new = base_weight(layer, "layer").replacement(lambda rows, start, stop: -0.5 * rows)
    assert type(new) is type(old)
    assert (new.dtype, new.shape) == (old.dtype, old.shape)
    layer.weight = new
    found = ALL[kind][1](layer)
    if kind == "int8":
        assert (found + 0.5 * matrix).abs().max() <= 0.51 * matrix.abs().amax(1).max() / 127
    else:
        assert new.quant_state.nested == old.quant_state.nested
        assert new.quant_state.quant_type == old.quant_state.quant_type
        assert new.quant_state.blocksize == old.quant_state.blocksize
        # half the widest gap between two levels of the code, and the rounding of nested block scales
        code = old.quant_state.code.sort().values
        assert (found + 0.5 * matrix).abs().max() <= 0.6 * code.diff().max() * 0.5 * matrix.abs().max()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_weights_repacked_for_the_cpu(quant_type, nested):
    """An evaluation on a CPU with AVX512-BF16 repacks the weight in place (bitsandbytes >= 0.49)."""
    repack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if repack is None:
        pytest.skip("this bitsandbytes does not repack")
    torch.manual_seed(0)
    layer = four_bit(128, 64, quant_type, nested)
    matrix = four_bit_matrix(layer)
    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    packed, absmax = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    for _ in range(2):
        weight = base_weight(layer, "layer")
        # bitsandbytes rounds the block scales to bf16 when it repacks
        torch.testing.assert_close(weight.rows(torch.arange(64)).double(), matrix, rtol=2**-7, atol=0)
        torch.testing.assert_close(weight.row_norms_squared().double(), matrix.square().sum(1), rtol=2**-7, atol=0)
    # what bitsandbytes multiplies with is as it was
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.weight.quant_state.absmax, absmax)
    new = weight.replacement(lambda rows, start, stop: rows)
    layer.weight = new
    torch.testing.assert_close(four_bit_matrix(layer), matrix, rtol=0.02, atol=0.02 * matrix.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_after_a_forward_pass(bits):
    torch.manual_seed(0)
    layer = four_bit(128, 64, "nf4", True) if bits == 4 else eight_bit(128, 64)
    matrix = four_bit_matrix(layer) if bits == 4 else eight_bit_matrix(layer)
    x = torch.randn(2, 128)
    layer.train()(x)
    close(base_weight(layer, "layer").rows(torch.arange(64)), matrix)
    with torch.no_grad():
        before = layer.eval()(x)
        rows = base_weight(layer, "layer").rows(torch.arange(64)).double()
        torch.testing.assert_close(rows, matrix, rtol=2**-7, atol=0)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_four_bit_layers_give_their_gradient_after_an_evaluation(bias, disabled):
    """bitsandbytes' product of a repacked weight has no gradient for x: without a bias it is left out in silence."""
    repack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if repack is None:
        pytest.skip("this bitsandbytes does not repack")
    torch.manual_seed(0)
    blocks = [four_bit(128, 128, "nf4", True, bias=bias) for _ in range(2)]
    model = get_peft_model(nn.Sequential(*blocks), DoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.eval()
    x = torch.randn(3, 128, requires_grad=True)

    def gradient():
        with model.disable_adapter() if disabled else nullcontext():
            return torch.autograd.grad(model(x).sum(), x)[0]

    expected = gradient()
    for block in blocks:
        # what an evaluation does on a CPU with AVX512-BF16
        block.weight.data, block.weight.quant_state = repack(block.weight.data, block.weight.quant_state)
    # it also rounds the block scales to bf16
    torch.testing.assert_close(gradient(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
