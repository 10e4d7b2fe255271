"""8-bit floats: scales by row take c, those by tensor, block and exponent are refused by name."""

import pytest
import torch
from codes_fixtures import PATH, check_blocks, check_rows, codes, held, some_c, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_peft.adapters.export.codes.fp8 import Fp8
from dora_peft.adapters.formats import UnreadableError


def fp8(out, inputs, scale, name="weight_scale", method="fbgemm_fp8", **options):
    weight = (torch.randn(out, inputs) * 30).to(torch.float8_e4m3fn)
    return held({"weight": weight, name: scale}, quant_method=method, **options), weight


@given(out=st.integers(4, 9), inputs=st.integers(1, 40), flat=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_scale_for_each_row(out, inputs, flat):
    scale = torch.rand(out, 1) / 50 + 1e-3
    checkpoint, weight = fp8(out, inputs, scale[:, 0] if flat else scale)
    one = codes(checkpoint)
    assert isinstance(one, Fp8)
    assert torch.equal(whole(one), weight.float() * scale)
    check_blocks(one)
    check_rows(checkpoint, ["weight_scale"])


@pytest.mark.parametrize(("out", "inputs"), [(256, 128), (200, 300), (5, 7)])
def test_deepseeks_blocks_dequantise_and_take_no_c(out, inputs):
    grid = -(-out // 128), -(-inputs // 128)
    scale = torch.rand(grid) / 50 + 1e-3
    checkpoint, weight = fp8(out, inputs, scale, "weight_scale_inv", "fp8", weight_block_size=[128, 128])
    expected = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :inputs]
    assert torch.equal(whole(codes(checkpoint)), expected)
    check_blocks(codes(checkpoint))
    with pytest.raises(UnreadableError, match=rf"{PATH}.*scales for blocks of 128 x 128.*|one scale for the whole"):
        codes(checkpoint).times(some_c(out))


def test_blocks_dequantise_as_transformers_does():
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(library, "Fp8Dequantize"):
        pytest.skip("another transformers")
    scale = torch.rand(2, 3) / 50 + 1e-3
    checkpoint, weight = fp8(256, 384, scale, "weight_scale_inv", "fp8", weight_block_size=[128, 128])
    found = library.Fp8Dequantize(None)._dequantize_one(weight, scale)
    assert torch.equal(found, whole(codes(checkpoint)))


def test_blocks_of_one_row_take_c():
    checkpoint, _ = fp8(6, 256, torch.rand(6, 2) + 0.1, "weight_scale_inv", "fp8", weight_block_size=[1, 128])
    check_rows(checkpoint, ["weight_scale_inv"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_tensor(shape):
    checkpoint, weight = fp8(6, 8, torch.full(shape, 0.5))
    assert torch.equal(whole(codes(checkpoint)), weight.float() * 0.5)
    with pytest.raises(UnreadableError, match=rf"{PATH}.*one scale for the whole tensor.*--dequantize"):
        codes(checkpoint).times(some_c(6))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_powers_of_two(kind):
    exponents = torch.randint(120, 134, (6, 2), dtype=torch.uint8)
    checkpoint, weight = fp8(6, 64, exponents.view(kind), "weight_scale_inv", "fp8", weight_block_size=[1, 32])
    expected = weight.float() * (exponents.float() - 127).exp2().repeat_interleave(32, 1)
    assert torch.equal(whole(codes(checkpoint)), expected)
    with pytest.raises(UnreadableError, match="powers of two"):
        codes(checkpoint).times(some_c(6))


def test_shapes_that_do_not_fit_and_missing_scales():
    with pytest.raises(UnreadableError, match="one for each 128 x 128"):
        codes(fp8(256, 256, torch.ones(3, 2), "weight_scale_inv", "fp8", weight_block_size=[128, 128])[0])
    with pytest.raises(UnreadableError, match="without scales"):
        codes(held({"weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, quant_method="fp8"))
