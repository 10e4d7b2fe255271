"""compressed-tensors' files: W0 as the library decompresses it, and c in the scales."""

import pytest
import torch
from codes_fixtures import PATH, check_blocks, check_rows, codes, held, packed, rescaled, some_c, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_peft.adapters.export.codes.compressed_tensors import METHOD, Compressed
from dora_peft.adapters.formats import UnreadableError

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def compressed(out, inputs, bits=4, groups=1, zeros=False, dtype=torch.bfloat16):
    """pack-quantized tensors, and W0 by the library's formula."""
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (out, inputs))
    scale = (torch.rand(out, groups) / 50 + 1e-3).to(dtype)
    tensors = {"weight_packed": packed(values + half, bits), "weight_scale": scale,
               "weight_shape": torch.tensor([out, inputs])}  # fmt: skip
    found = values.to(dtype).view(out, groups, -1)
    if zeros:
        zero = torch.randint(-half, half, (out, groups))
        tensors["weight_zero_point"] = packed((zero + half).T, bits).T.contiguous()
        found = found - zero.to(dtype)[:, :, None]
    return held(tensors, quant_method=METHOD, format="pack-quantized"), (found * scale[:, :, None]).flatten(1)


def matrix(out, inputs, kind=torch.int8, scales=None, dtype=torch.bfloat16, zeros=False):
    """int-quantized or float-quantized tensors."""
    values = torch.randint(-100, 100, (out, inputs)).to(kind)
    scale = (torch.rand(scales or (out, 1)) / 50 + 1e-3).to(dtype)
    tensors = {"weight": values, "weight_scale": scale}
    found = values.to(dtype)
    if zeros:
        tensors["weight_zero_point"] = torch.randint(-9, 9, (out, 1), dtype=torch.int8)
        found = found - tensors["weight_zero_point"].to(dtype)
    return held(tensors, quant_method=METHOD, format="int-quantized"), found * scale


@given(
    out=st.integers(4, 40),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32, 33]),
    bits=st.sampled_from([2, 4, 8]),
    zeros=st.booleans(),
    dtype=DTYPES,
)
@settings(max_examples=40, deadline=None)
def test_packed_codes(out, groups, size, bits, zeros, dtype):
    checkpoint, expected = compressed(out, groups * size, bits, groups, zeros, dtype)
    one = codes(checkpoint)
    assert isinstance(one, Compressed)
    assert torch.equal(whole(one), expected)
    check_blocks(one)
    check_rows(checkpoint, ["weight_scale"])


@given(
    out=st.integers(4, 9), inputs=st.integers(1, 40), kind=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    dtype=DTYPES, zeros=st.booleans(), flat=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_codes_in_a_matrix(out, inputs, kind, dtype, zeros, flat):
    checkpoint, expected = matrix(out, inputs, kind, dtype=dtype, zeros=zeros)
    if flat:
        scale = checkpoint.tensors[f"{PATH}.weight_scale"]
        checkpoint = type(checkpoint)({**checkpoint.tensors, f"{PATH}.weight_scale": scale[:, 0]}, checkpoint.config)
    one = codes(checkpoint)
    assert isinstance(one, Compressed)
    assert torch.equal(whole(one), expected)
    check_blocks(one)
    check_rows(checkpoint, ["weight_scale"])


def test_scales_of_bf16_take_the_dtype_asked_for():
    assert check_rows(compressed(8, 64)[0], ["weight_scale"], dtype=torch.float16).dtype == torch.float16
    half = compressed(8, 64, dtype=torch.float16)[0]
    assert check_rows(half, ["weight_scale"], dtype=torch.float32).dtype == torch.float16


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_one_scale_for_the_tensor_dequantises_and_takes_no_c(shape):
    checkpoint, _ = matrix(8, 16, scales=(1,))
    scale = torch.full(shape, 0.5)
    checkpoint = type(checkpoint)({**checkpoint.tensors, f"{PATH}.weight_scale": scale}, checkpoint.config)
    assert torch.equal(whole(codes(checkpoint)), checkpoint.tensors[f"{PATH}.weight"] * 0.5)
    with pytest.raises(UnreadableError, match=rf"{PATH}.*one scale for the whole tensor.*--dequantize"):
        codes(checkpoint).times(some_c(8))


def test_blocks_global_scales_and_other_widths_are_refused():
    checkpoint, _ = matrix(8, 16, scales=(1,))
    for change in (
        {f"{PATH}.weight_scale": torch.ones(2, 2)},
        {f"{PATH}.weight_global_scale": torch.ones(1)},
        {f"{PATH}.weight_scale": torch.ones(8, 1, dtype=torch.uint8)},
    ):
        with pytest.raises(UnreadableError, match=PATH):
            codes(type(checkpoint)({**checkpoint.tensors, **change}, checkpoint.config))
    packed_, _ = compressed(8, 64)
    packed_.tensors[f"{PATH}.weight_shape"] = torch.tensor([8, 80])
    with pytest.raises(UnreadableError, match="codes of 2, 4 or 8 bits"):
        codes(packed_)


GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel"}
SCHEMES = [
    {**GROUPS, "symmetric": True},
    {**GROUPS, "symmetric": False},
    {**CHANNELS, "symmetric": True},
    {**CHANNELS, "symmetric": False},
    {**CHANNELS, "type": "float"},
    {**CHANNELS, "type": "float", "strategy": "tensor"},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda one: f"{one['type']}{one['num_bits']}-{one['strategy']}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore")
def test_the_library_decompresses_alike(scheme, dtype):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    assert library.__version__
    scheme = QuantizationScheme(targets=["Linear"], weights=scheme)
    kind = "float-quantized" if scheme.weights.type == "float" else "pack-quantized"
    compressor = BaseCompressor.get_value_from_registry(kind)
    weight = torch.randn(24, 64).to(dtype) / 10
    shape = {"group": (24, 2), "channel": (24, 1), "tensor": (1,)}[scheme.weights.strategy]
    state = {"weight": weight, "weight_scale": (torch.rand(shape) / 50 + 1e-2).to(dtype)}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = torch.randint(-5, 5, shape, dtype=torch.int8)
    saved = compressor.compress(state, scheme)
    checkpoint = held(saved, quant_method=METHOD, format=kind)
    assert torch.equal(whole(codes(checkpoint)), compressor.decompress(dict(saved), scheme)["weight"])
    if shape != (1,):
        after = rescaled(checkpoint, some_c(24, sign=True))
        own = {key[len(PATH) + 1 :]: one for key, one in after.tensors.items() if key.startswith(f"{PATH}.")}
        assert set(own) == set(saved)
        assert torch.equal(whole(codes(after)), compressor.decompress(own, scheme)["weight"])
