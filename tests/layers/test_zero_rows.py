"""Channels whose base weight is zero train as plain LoRA."""

import pytest
import torch
from layer_fixtures import (
    KINDS,
    One,
    adapted,
    base_of,
    dora,
    example,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig

ZERO = [1, 4]


def with_zero_rows(kind, config):
    torch.manual_seed(0)
    layer = KINDS[kind]().double()
    with torch.no_grad():
        layer.weight.normal_()
        rows = layer.weight.T if isinstance(layer, (nn.Embedding, Conv1D)) else layer.weight
        rows[ZERO] = 0
    torch.manual_seed(1)
    return get_peft_model(One(layer), config(r=4, lora_alpha=3, target_modules=["layer"])).double()


def channel(y, index):
    """The channels that belong to these rows."""
    return y[:, index] if y.dim() > 3 else y[..., index]


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", "Conv1D", "embedding", "conv2d", "conv3d"])
def test_zero_rows_train_as_plain_lora(kind, detach):
    ours = with_zero_rows(kind, lambda **options: DoraConfig(detach_norm=detach, **options))
    lora = with_zero_rows(kind, lambda **options: LoraConfig(fan_in_fan_out=kind == "Conv1D", **options))
    x = example(ours, grad=False)
    # where PEFT's initial B is not zero, and A is
    if kind == "embedding":
        assert not ours.base_model.model.layer.lora_embedding_A["default"].any()
    names = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    magnitude = dora(ours).lora_magnitude_vector["default"].weight
    for _ in range(3):
        gradients = []
        for model in (ours, lora):
            model.zero_grad()
            y = channel(model(x), ZERO)
            (y**2 + y).sum().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if name in names})
        for name, grad in gradients[1].items():
            torch.testing.assert_close(gradients[0][name], grad)
        assert magnitude.grad is None or not magnitude.grad.flatten()[ZERO].any()
        for model in (ours, lora):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            optimizer.step()
        torch.testing.assert_close(channel(ours(x), ZERO), channel(lora(x), ZERO))
    # and all rows together stay finite
    ours(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before)


def test_a_row_that_the_adapter_cancels_stays_finite():
    """v = 0 over W0 != 0: floored, not tied."""
    model = adapted("linear")
    layer = dora(model)
    lora_A, lora_B = layer.factor_parameters("default")
    with torch.no_grad():
        lora_B.zero_()
        lora_A.zero_()
        lora_A[0] = base_of(model).weight[2]
        lora_B[2, 0] = -1 / layer.scaling["default"]
    y = model(example(model))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
