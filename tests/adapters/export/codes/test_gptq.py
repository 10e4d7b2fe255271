"""GPTQ's and AWQ's files: W0 as gptqmodel dequantises it, and c in the scales."""

import pytest
import torch
from codes_fixtures import PATH, check_blocks, check_rows, codes, held, packed, rescaled, some_c, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_peft.adapters.export.codes.bits import unpack
from dora_peft.adapters.export.codes.gptq import ORDER, Awq, Gptq
from dora_peft.adapters.formats import UnreadableError


def gptq(out, inputs, bits=4, size=32, order=False, version="gptq", dtype=torch.float16):
    """Tensors of a module, and W0 by the format's formula in fp64."""
    groups = -(-inputs // size)
    values = torch.randint(2**bits, (out, inputs))
    # v1 stores zeros less one, and none of 2 ** bits - 1 that would not fit afterwards
    zeros = torch.randint(2**bits - 1, (groups, out)) + 1
    scales = (torch.rand(groups, out) / 50 + 1e-3).to(dtype)
    g_idx = torch.arange(inputs) // size
    if order:
        g_idx = g_idx[torch.randperm(inputs)]
    tensors = {
        "qweight": packed(values, bits).T.contiguous(),
        "qzeros": packed(zeros - int(version == "gptq"), bits),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    expected = scales.double().T[:, g_idx] * (values - zeros.T[:, g_idx])
    options = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version}
    return held(tensors, **options), expected.to(dtype)


def awq(out, inputs, size=32, dtype=torch.float16):
    values, zeros = torch.randint(16, (inputs, out)), torch.randint(16, (inputs // size, out))
    scales = (torch.rand(inputs // size, out) / 50 + 1e-3).to(dtype)
    # column ORDER[i] of a word is where its code i lies
    inverse = [ORDER.index(i) for i in range(8)]
    interleave = lambda one: one.view(len(one), -1, 8)[:, :, inverse].flatten(1)  # noqa: E731
    tensors = {"qweight": packed(interleave(values), 4), "qzeros": packed(interleave(zeros), 4), "scales": scales}
    expected = scales.double().repeat_interleave(size, 0) * (values - zeros.repeat_interleave(size, 0))
    return held(tensors, quant_method="awq", bits=4, group_size=size, version="gemm"), expected.T.to(dtype)


GPTQ = {
    "out": st.integers(1, 4).map(lambda n: 32 * n),
    "inputs": st.integers(1, 4).map(lambda n: 32 * n),
    "bits": st.sampled_from([2, 4, 8]),
    "size": st.sampled_from([32, 128]),
    "order": st.booleans(),
    "version": st.sampled_from(["gptq", "gptq_v2"]),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
}


@given(**GPTQ)
@settings(max_examples=40, deadline=None)
def test_gptq_is_scale_times_code_less_zero(**shape):
    checkpoint, expected = gptq(**shape)
    one = codes(checkpoint)
    assert isinstance(one, Gptq)
    assert torch.equal(whole(one), expected)
    check_blocks(one)
    check_rows(checkpoint, ["scales"])


@given(out=st.integers(1, 4).map(lambda n: 8 * n), groups=st.integers(1, 4), dtype=GPTQ["dtype"])
@settings(max_examples=40, deadline=None)
def test_awq_is_scale_times_code_less_zero(out, groups, dtype):
    checkpoint, expected = awq(out, groups * 32, dtype=dtype)
    one = codes(checkpoint)
    assert isinstance(one, Awq)
    assert torch.equal(whole(one), expected)
    check_blocks(one)
    check_rows(checkpoint, ["scales"])


def test_scales_of_bf16_take_the_dtype_asked_for_and_those_of_fp16_keep_theirs():
    for make in (gptq, awq):
        for dtype, after in ((torch.bfloat16, torch.float16), (torch.float16, torch.float16)):
            two = check_rows(make(32, 64, dtype=dtype)[0], ["scales"], dtype=torch.float16)
            assert two.dtype == after


def test_without_g_idx_groups_are_in_order():
    checkpoint, expected = gptq(64, 96)
    tensors = {key[len(PATH) + 1 :]: one for key, one in checkpoint.tensors.items() if PATH + "." in key}
    del tensors["g_idx"]
    without = held(tensors, **checkpoint.config["quantization_config"])
    assert torch.equal(whole(codes(without)), expected)


@pytest.mark.parametrize(
    ("change", "found"),
    [({"checkpoint_format": "marlin"}, "marlin"), ({"quant_method": "other"}, "'other'")],
)
def test_other_formats_are_refused_by_name(change, found):
    checkpoint, _ = gptq(32, 32)
    checkpoint.config["quantization_config"].update(change)
    with pytest.raises(UnreadableError, match=rf"{PATH}.*{found}"):
        codes(checkpoint)


def test_other_shapes_are_refused():
    checkpoint, _ = awq(32, 64)
    checkpoint.config["quantization_config"]["version"] = "gemv"
    with pytest.raises(UnreadableError, match="'gemv'"):
        codes(checkpoint)
    checkpoint, _ = gptq(32, 64)
    checkpoint.config["quantization_config"]["quant_method"] = "awq"
    with pytest.raises(UnreadableError, match="qweight"):
        codes(checkpoint)


def test_a_scale_that_leaves_fp16_is_an_error():
    checkpoint, _ = gptq(32, 32)
    checkpoint.tensors[f"{PATH}.scales"][0, 3] = 60000
    with pytest.raises(UnreadableError, match=r"reaches 1.2e\+05"):
        codes(checkpoint).times(torch.full((32,), 2.0))


def test_the_library_dequantises_gptq_alike():
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for bits in (4, 8, 2):
        for order in (False, True):
            checkpoint, _ = gptq(64, 128, bits=bits, order=order)
            for now in (checkpoint, rescaled(checkpoint, some_c(64, sign=True))):
                layer = torch_linear(bits=bits, group_size=32, sym=False, desc_act=order, in_features=128,
                                     out_features=64, bias=False)  # fmt: skip
                layer.load_state_dict({key[len(PATH) + 1 :]: one.clone() for key, one in now.tensors.items()
                                       if key.startswith(f"{PATH}.")})  # fmt: skip
                convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
                layer.optimized = True
                layer.post_init()
                layer.eval()
                assert torch.equal(layer.dequantize_weight().T, whole(codes(now)))


def test_the_library_dequantises_awq_alike():
    library = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    checkpoint, _ = awq(64, 128)
    for now in (checkpoint, rescaled(checkpoint, some_c(64, sign=True))):
        own = {key[len(PATH) + 1 :]: one for key, one in now.tensors.items() if key.startswith(f"{PATH}.")}
        found = library.dequantize_gemm(own["qweight"], own["qzeros"], own["scales"], 4, 32)
        assert torch.equal(found.T, whole(codes(now)))


def test_the_packing_is_that_of_unpack():
    for bits in (2, 4, 8):
        values = torch.randint(2**bits, (3, 50))
        assert torch.equal(unpack(packed(values, bits), bits, 50), values.int())
