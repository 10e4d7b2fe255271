"""PEFT's LoRA+ and LoRA-FA helpers on DoRA models."""

import peft
import pytest
import torch
from model_fixtures import NAMES, X, adapter_parameters, config, mlp, train
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

from dora_peft import DoraConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.lin = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids):
        return self.conv(self.lin(self.embed(ids)).transpose(1, 2))


def rates(model, **options):
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.25, loraplus_lr_ratio=4, loraplus_weight_decay=0.5, **options
    )
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_loraplus_gives_m_the_common_rate_and_all_else_pefts():
    options = {"r": 2, "target_modules": ["embed", "lin", "conv"], "bias": "all"}
    ours = rates(get_peft_model(Net(), DoraConfig(**options)))
    theirs = rates(get_peft_model(Net(), LoraConfig(**options)))
    magnitudes = {name: ours.pop(name) for name in list(ours) if "magnitude" in name}
    assert len(magnitudes) == 3
    assert set(magnitudes.values()) == {(0.25, 0.0)}
    assert ours == theirs
    assert {rate for rate, _ in ours.values()} >= {0.25, 1.0}
    if Version(peft.__version__) >= Version("0.21"):
        assert {rate for name, (rate, _) in ours.items() if "embedding" in name} == {1e-6}


def test_loraplus_moves_m_by_the_common_rate():
    model = train(get_peft_model(mlp(), config())).train()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.25, loraplus_lr_ratio=4)
    model(X).square().sum().backward()
    before = {n: p.detach().clone() for n, p in adapter_parameters(model, "default").items()}
    optimizer.step()
    for name, p in adapter_parameters(model, "default").items():
        rate = 1.0 if "lora_B" in name else 0.25
        torch.testing.assert_close(p, before[name] - rate * p.grad, rtol=1e-6, atol=1e-9)


def test_loraplus_on_pefts_own_model_is_pefts():
    own = rates(get_peft_model(mlp(), LoraConfig(r=2, target_modules=list(NAMES), use_dora=True)))
    assert {rate for name, (rate, _) in own.items() if "magnitude" in name} == {1.0}


class Exploration(nn.Module):
    """Its names have "lora" in them."""

    def __init__(self):
        super().__init__()
        self.exploration_a, self.exploration_b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.exploration_b(torch.tanh(self.exploration_a(x))))


def test_lorafa_projects_b_and_trains_m_apart():
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "modules_to_save": ["head"], "rank_pattern": {"exploration_b": 3}}
    model = get_peft_model(Exploration(), DoraConfig(r=2, lora_alpha=3, exclude_modules=["head"], **options))
    model.add_adapter("other", DoraConfig(r=2, target_modules=["exploration_a"]))
    heads = {n for n, p in model.named_parameters() if "head" in n and p.requires_grad}
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.01, weight_decay=0.5)
    x = torch.randn(16, 6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            for name in ("exploration_a", "exploration_b"):
                layer = model.base_model.model.get_submodule(name)
                A, s = layer.lora_A["default"].weight, layer.scaling["default"]
                projected = grads[f"base_model.model.{name}.lora_B.default.weight"] @ torch.linalg.pinv(A @ A.T) / s**2
                state = optimizer.state[f"base_model.model.{name.replace('lora', 'lo_ra')}.lora"]
                # bf16 products, and (1 - beta1) of the gradient
                torch.testing.assert_close(state["exp_avg_B"], 0.1 * projected, rtol=0.05, atol=0.05 * projected.std())
    assert losses[-1] < 0.8 * losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if "lora_" in n} == {
        f"base_model.model.exploration_{x}.{part}.default.weight"
        for x in "ab"
        for part in ("lora_B", "lora_magnitude_vector")
    }
    # PEFT 0.20 freezes modules_to_save when another adapter is added
    assert {n for n in moved if "head" in n} == heads
    assert bool(heads) == (Version(peft.__version__) >= Version("0.21"))


def test_lorafa_does_not_decay_m():
    model = train(get_peft_model(mlp(), config()))
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model, "default").items()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in adapter_parameters(model, "default").items():
        assert torch.equal(p, before[name]) == ("lora_B" not in name), name


@pytest.mark.parametrize("target", ["embed", "conv"])
def test_lorafa_is_refused_for_other_kinds_of_layers(target):
    model = get_peft_model(Net(), DoraConfig(r=2, target_modules=[target]))
    with pytest.raises(ValueError, match=rf"LoRA-FA.*{target}.*param_groups"):
        create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.1)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_lorafa_wants_one_adapter():
    model = get_peft_model(mlp(), config())
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter, found 2"):
        create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.1)
