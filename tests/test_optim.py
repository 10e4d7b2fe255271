"""Parameter groups and the warning about decayed magnitudes."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dora_peft import DoraConfig, param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.lin = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids):
        x = self.lin(self.embed(ids))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x))


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(Net(), DoraConfig(r=2, target_modules=["embed", "lin", "conv"], **options))


def group_of(groups, parameter):
    found = [group for group in groups if any(p is parameter for p in group["params"])]
    assert len(found) == 1
    return found[0]


def train_one_step(model, optimizer):
    model(torch.arange(12).view(2, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"bias": "all", "modules_to_save": ["head", "norm"]}])
def test_every_trainable_parameter_is_in_one_group(options):
    model = adapted(**options)
    groups = param_groups(model, weight_decay=0.1, lr_magnitude=0.5)
    in_groups = [p for group in groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(in_groups) == len(trainable) == len({id(p) for p in in_groups})
    kinds = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of(groups, parameter)
        if "lora_magnitude_vector" in name:
            assert (group["weight_decay"], group.get("lr")) == (0.0, 0.5), name
            kinds.add("magnitude")
        elif parameter.ndim < 2:
            assert group["weight_decay"] == 0.0, name
            assert "lr" not in group, name
            kinds.add("vector")
        else:
            assert group["weight_decay"] == 0.1, name
            assert "lr" not in group, name
            kinds.add("matrix")
    assert kinds >= {"magnitude", "matrix"}
    assert ("vector" in kinds) == bool(options)


def test_empty_groups_are_left_out_and_the_learning_rate_stays_the_optimizers():
    groups = param_groups(adapted(), weight_decay=0.1)
    assert len(groups) == 2
    assert all(group["params"] for group in groups)
    assert all("lr" not in group for group in groups)
    optimizer = torch.optim.SGD(groups, lr=0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_weight_decay_never_moves_a_magnitude():
    model = adapted()
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert moved
    assert not any("magnitude" in name for name in moved)


def test_lr_magnitude_changes_the_step_of_the_magnitudes_alone():
    def step(lr_magnitude):
        model = adapted()
        optimizer = torch.optim.SGD(param_groups(model, lr_magnitude=lr_magnitude), lr=0.1)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        train_one_step(model, optimizer)
        return {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}

    slow, fast = step(0.1), step(0.2)
    for name in slow:
        factor = 2 if "magnitude" in name else 1
        # differences of values near 1 in fp32, so an absolute tolerance
        torch.testing.assert_close(fast[name], factor * slow[name], rtol=1e-4, atol=1e-6)
    assert any(change.abs().max() > 1e-4 for name, change in slow.items() if "magnitude" in name)


def test_inactive_adapters_stay_out():
    model = adapted()
    model.add_adapter("other", DoraConfig(r=2, target_modules=["lin"]))
    names = {id(p): n for n, p in model.named_parameters()}
    listed = {names[id(p)] for group in param_groups(model) for p in group["params"]}
    assert listed
    assert not any(".other" in name for name in listed)


def test_a_model_without_trainable_parameters_is_an_error():
    model = adapted().requires_grad_(False)
    with pytest.raises(ValueError, match=r"trainable parameters, found none.*is_trainable=True"):
        param_groups(model)


def test_decaying_a_magnitude_warns_once_per_optimizer():
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"DoRA magnitudes.*param_groups\(model, weight_decay=0\.1\).*optimizers=\("):
        train_one_step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_one_step(model, optimizer)


@pytest.mark.parametrize("kind", ["no decay", "param_groups", "another model"])
def test_no_warning_where_no_magnitude_is_decayed(kind):
    model = adapted()
    parameters = {
        "no decay": [{"params": model.parameters(), "weight_decay": 0.0}],
        "param_groups": param_groups(model, weight_decay=0.1),
        "another model": list(nn.Linear(2, 2).parameters()),
    }[kind]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_one_step(model, optimizer)


def test_the_warning_finds_magnitudes_that_are_computed():
    model = adapted()
    masked = model.base_model.model.lin.lora_magnitude_vector["default"]
    nn.utils.prune.l1_unstructured(masked, "weight", 0.5)
    with pytest.warns(UserWarning, match="weight decay to DoRA magnitudes"):
        train_one_step(model, torch.optim.AdamW(masked.parameters(), weight_decay=0.1))


@pytest.mark.parametrize("own", [True, False])
def test_trainer_takes_the_optimizer_as_the_warning_says(own, tmp_path):
    """`optimizers=(optimizer, None)`: the magnitudes are not decayed, and the scheduler is the trainer's own."""
    transformers = pytest.importorskip("transformers")

    class Labelled(Net):
        def forward(self, ids, labels=None):
            return {"loss": super().forward(ids).square().sum()}

    torch.manual_seed(0)
    model = get_peft_model(Labelled(), DoraConfig(r=2, target_modules=["embed", "lin", "conv"]))
    options = {"max_steps": 2, "report_to": [], "weight_decay": 0.5, "use_cpu": True, "learning_rate": 1e-3}
    arguments = transformers.TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **options)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.5), lr=1e-3)
    data = [{"ids": torch.arange(6), "labels": torch.zeros(())}] * 4
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer if own else None, None))
    if own:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*weight decay.*")
            trainer.train()
        assert trainer.lr_scheduler is not None
    else:
        with pytest.warns(UserWarning, match=r"weight_decay=0\.5.*optimizers=\(optimizer, None\)"):
            trainer.train()


@pytest.mark.parametrize("target", ["lin", "conv"])
def test_a_masked_magnitude_stays_a_magnitude(target):
    model = adapted()
    masked = getattr(model.base_model.model, target).lora_magnitude_vector["default"]
    nn.utils.prune.l1_unstructured(masked, "weight", 0.5)
    group = group_of(param_groups(model, weight_decay=0.1, lr_magnitude=0.5), masked.weight_orig)
    assert (group["weight_decay"], group["lr"]) == (0.0, 0.5)
