"""Layers over bitsandbytes' 4- and 8-bit weights."""

import pytest
import torch
from layer_fixtures import (
    One,
    adapted,
    base_of,
    distance,
    dora,
    found_gradients,
    perturb,
)
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig


def quantised(bits, **options):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32, **options)
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, **options)
    layer.load_state_dict(plain.state_dict())
    model = get_peft_model(One(layer.to("cpu")), DoraConfig(r=4, lora_alpha=3, target_modules=["layer"]))
    perturb(dora(model), "default")
    return model


def stored(layer):
    """Every tensor of a quantised weight, wherever bitsandbytes keeps it now."""
    weight = layer.weight
    if hasattr(weight, "SCB"):
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return {"data": weight.data.clone(), "SCB": scale.clone()}
    state = weight.quant_state.as_dict(packed=True)
    return {"data": weight.data.clone(), **{key: value.clone() for key, value in state.items()}}


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("used", [False, True])
def test_quantised_bases_unmerge_bit_for_bit(bits, used):
    model = quantised(bits).train()
    x = torch.randn(3, 64, requires_grad=True)
    if used:
        model(x)
    before = stored(base_of(model))
    output = model(x)
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(stored(base_of(model))["data"], before["data"])
        merged = model(x)
        # the merged weight is quantised again
        assert distance(merged.detach(), output.detach().double()) < (0.2 if bits == 4 else 0.03)
        model.unmerge_adapter()
        after = stored(base_of(model))
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert torch.equal(model(x), output)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_safe_merge(bits):
    model = quantised(bits)
    x = torch.randn(3, 64)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    with torch.no_grad():
        dora(model).lora_magnitude_vector["default"].weight[3] = float("nan")
    before = stored(base_of(model))
    with pytest.raises(ValueError, match=r"module 'layer'"):
        model.merge_adapter(safe_merge=True)
    assert not dora(model).merged
    after = stored(base_of(model))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model(x)[:, :3].isfinite().all()


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
