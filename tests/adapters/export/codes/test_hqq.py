"""HQQ's files: W0 as HQQ dequantises it, and c in the scale."""

import pytest
import torch
from codes_fixtures import PATH, check_blocks, check_rows, codes, held, rescaled, some_c, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_peft.adapters.export.codes.hqq import REST, SHIFTS, Hqq
from dora_peft.adapters.formats import UnreadableError


def text(value):
    return torch.tensor([ord(one) for one in str(value)], dtype=torch.uint8)


def hqq(out, inputs, packing="4bit_u8", size=64, axis=1, dtype=torch.float16):
    """Tensors of a module as HQQLinear.state_dict makes them, and W0 by HQQ's formula."""
    shifts = SHIFTS[packing]
    bits = {"8": 8, "4": 4, "3": 3, "2": 2, "1": 1}[packing[0]]
    groups = out * inputs // size
    view = (groups, size) if axis else (size, groups)
    values = torch.randint(2**bits, view)
    rows = -(-view[0] // len(shifts))
    filled = torch.nn.functional.pad(values, (0, 0, 0, rows * len(shifts) - view[0])).view(len(shifts), rows, view[1])
    words = sum(part << shift for part, shift in zip(filled, shifts, strict=True))
    per_group = (groups, 1) if axis else (1, groups)
    scale, zero = (torch.rand(per_group) / 50 + 1e-3).to(dtype), (torch.rand(per_group) * 2**bits).to(dtype)
    tensors = {
        "W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero,
        "shape": torch.tensor([out, inputs]), "axis": torch.tensor(axis, dtype=torch.int32), "packing": text(packing),
        "nbits": torch.tensor(bits, dtype=torch.int32), "group_size": torch.tensor(size, dtype=torch.int32),
        "view_as_float": torch.tensor(0, dtype=torch.uint8), "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8), "compute_dtype": text(dtype),
        "unpack_view_dtype": text(torch.uint8),
    }  # fmt: skip
    return held(tensors, quant_method="hqq"), ((values.to(dtype) - zero) * scale).reshape(out, inputs)


@given(
    out=st.integers(4, 9),
    groups=st.integers(1, 3),
    packing=st.sampled_from(list(SHIFTS)),
    size=st.sampled_from([8, 64]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@settings(max_examples=40, deadline=None)
def test_a_weight_is_code_less_zero_times_scale(out, groups, packing, size, dtype):
    # HQQ packs a number of groups that its words divide
    out *= 1 if packing == "3bit_32" else len(SHIFTS[packing])
    checkpoint, expected = hqq(out, groups * size, packing, size, dtype=dtype)
    one = codes(checkpoint)
    assert isinstance(one, Hqq)
    assert torch.equal(whole(one), expected)
    check_blocks(one)
    check_rows(checkpoint, ["scale"])


def test_bf16_takes_another_dtype_with_its_zeros_and_compute_dtype():
    checkpoint, _ = hqq(8, 64, dtype=torch.bfloat16)
    two = check_rows(checkpoint, ["scale", "zero", "compute_dtype"], dtype=torch.float16)
    assert two.dtype == torch.float16
    assert codes(rescaled(checkpoint, some_c(8))).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("size", "axis", "found"), [(64, 0, "across rows"), (96, 1, "groups of 96 run across rows of 64")]
)
def test_groups_across_rows_dequantise_and_take_no_c(size, axis, found):
    checkpoint, expected = hqq(12, 64, size=size, axis=axis)
    assert torch.equal(whole(codes(checkpoint)), expected)
    check_blocks(codes(checkpoint))
    with pytest.raises(UnreadableError, match=rf"{PATH}.*{found}.*--dequantize"):
        codes(checkpoint).times(some_c(12))


@pytest.mark.parametrize(
    ("name", "value"),
    [("view_as_float", torch.tensor(1)), ("quant_scale", torch.tensor(1)), ("packing", text("5bit"))],
)
def test_other_layouts_are_refused(name, value):
    checkpoint, _ = hqq(8, 64)
    checkpoint.tensors[f"{PATH}.{name}"] = value
    with pytest.raises(UnreadableError, match=PATH):
        codes(checkpoint)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_library_dequantises_alike(bits, axis, dtype):
    library = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(128, 32, bias=False)
    config = library.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = library.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    saved = {key: one.data if isinstance(one, torch.nn.Parameter) else one for key, one in layer.state_dict().items()}
    assert set(saved) <= {"W_q", "scale", *REST}
    checkpoint = held(saved, quant_method="hqq")
    assert torch.equal(whole(codes(checkpoint)), layer.dequantize())
    if axis:
        after = rescaled(checkpoint, some_c(32, sign=True))
        own = {key[len(PATH) + 1 :]: one for key, one in after.tensors.items() if f"{PATH}." in key}
        layer.load_state_dict({**own, "W_q": torch.nn.Parameter(own["W_q"], requires_grad=False)})
        assert torch.equal(whole(codes(after)), layer.dequantize())
