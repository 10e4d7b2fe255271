"""Tiny models with changed weights, and what the analysis has to find there, for the tests of its modules."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dora_peft import DoraConfig
from dora_peft.analysis import Change, to_history

TARGETS = ["q_proj", "v_proj", "up_proj"]


def truth(weight0, weight, magnitude=None):
    """dM and dD in float64. 1 - cos is half the squared distance of the unit rows, which cancels nothing."""
    weight0, weight = weight0.double(), weight.double()
    w, v = weight0.norm(dim=1), weight.norm(dim=1)
    whole = (w > 0) & (v > 0)
    apart = (weight[whole] / v[whole, None] - weight0[whole] / w[whole, None]).square().sum(1) / 2
    m = v if magnitude is None else magnitude.double().flatten()
    return (m - w).abs().mean().item(), apart.mean().item()


def llama(layers=2):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "vocab_size": 32}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config)


def config(kind, **options):
    shared = {"r": 2, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    if kind == "dora":
        return DoraConfig(**(shared | options))
    return LoraConfig(**(shared | {"use_dora": kind == "peft_dora"} | options))


def trained(kind, **options):
    """An adapter with random factors, and magnitudes that are not those of its start."""
    model = get_peft_model(llama(), config(kind, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def fit(model, folder, callback, max_steps=5, resume=None, extra=None, **options):
    rows = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
                "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}  # fmt: skip
    arguments = TrainingArguments(str(folder), max_steps=max_steps, **(defaults | options))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback, *([extra] if extra else [])])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def at(history, step):
    return {e["module"]: Change(e["magnitude"], e["direction"]) for e in history if e["step"] == step}


def nudged(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def dense(model, adapter="default"):
    """The truth of a live model's adapted modules from dense weights: W0, W0 + s B A and m."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and adapter in module.lora_A:
            A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
            weight0 = module.get_base_layer().weight.double()
            m = module.lora_magnitude_vector[adapter].weight if len(module.lora_magnitude_vector) else None
            found[name] = truth(weight0, weight0 + module.scaling[adapter] * B @ A, m)
    assert found
    return found


def assert_equal(found, expected, rel=1e-9):
    """The same modules with the same changes; says by itself what differs, as pytest rewrites no asserts here."""
    assert found.keys() == expected.keys(), (list(found), list(expected))
    assert found
    for name in found:
        same = tuple(found[name]) == pytest.approx(tuple(expected[name]), rel=rel, abs=1e-15)
        assert same, (name, found[name], expected[name])


def records(x, y):
    """With x, the changes of direction, and y, those of magnitude, [modules, checkpoints]."""
    return [
        entry
        for step in range(x.shape[1])
        for entry in to_history(
            step, {f"layers.{i}.q": Change(y[i, step].item(), x[i, step].item()) for i in range(len(x))}
        )
    ]
