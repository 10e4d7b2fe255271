"""Optimizer parameter groups for DoRA, without weight decay on magnitudes, which would shrink the weight itself.

Importing the module installs a hook on the steps of all torch optimizers, which warns of one that decays magnitudes.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .layers.magnitude import Magnitude

# The optimizers that the hook has looked at.
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, lr_magnitude: float | None = None
) -> list[dict[str, object]]:
    """Trainable parameters in groups for a torch optimizer, with the magnitudes left out of weight decay.

    Decaying lora_A and lora_B pulls the weight towards W0, as in LoRA. Decaying m pulls the adapted weight itself
    towards 0, which no published DoRA recipe intends. Biases and norms (one-dimensional parameters) are not decayed
    either.

    Args:
        model: A model with DoRA adapters; other trainable parameters are included.
        weight_decay: For the matrices.
        lr_magnitude: Learning rate of the magnitudes, the optimizer's if None.

    Returns:
        Up to three groups: decayed, not decayed, magnitudes; empty ones are left out.

    Raises:
        ValueError: The model has no trainable parameter.

    Example:
        >>> optimizer = torch.optim.AdamW(dora_peft.param_groups(model, weight_decay=0.01), lr=1e-4)
    """
    # a masked or parametrized one is computed from its parameters
    magnitudes = {id(p) for m in model.modules() if isinstance(m, Magnitude) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "Expected a model with trainable parameters, found none. Load adapters with is_trainable=True, or call "
            "model.set_adapter(name)."
        )
    others = [p for p in trainable if id(p) not in magnitudes]
    m_group: dict[str, object] = {"params": [p for p in trainable if id(p) in magnitudes], "weight_decay": 0.0}
    if lr_magnitude is not None:
        m_group["lr"] = lr_magnitude
    groups: list[dict[str, object]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        m_group,
    ]
    return [group for group in groups if group["params"]]


def _warn_about_decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    decayed = {
        id(p): group["weight_decay"]
        for group in optimizer.param_groups
        if group.get("weight_decay")
        for p in group["params"]
    }
    found = [decayed[id(p)] for m in Magnitude.all() for p in m.parameters() if id(p) in decayed] if decayed else []
    if found:
        own = f"torch.optim.AdamW(dora_peft.param_groups(model, weight_decay={float(found[0]):g}), lr=...)"
        warnings.warn(
            "The optimizer applies weight decay to DoRA magnitudes, which shrinks the adapted weights themselves. "
            f"Leave them out with an optimizer of your own, optimizer = {own}. Trainer and TRL's trainers take it as "
            "Trainer(model, ..., optimizers=(optimizer, None)), with a scheduler in the place of None if you have one. "
            "Make the model with get_peft_model first then, and give the trainer no peft_config.",
            stacklevel=2,
        )


def at_common_rate(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float) -> None:
    """Take the magnitudes out of an optimizer's groups, into one of their own with this learning rate and no decay.

    Args:
        optimizer: One that has not made a step; nothing happens if it has none of the model's magnitudes.
        model: The model that they belong to.
        lr: Their learning rate.
    """
    own = {id(p) for m in model.modules() if isinstance(m, Magnitude) for p in m.parameters()}
    moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    if moved:
        optimizer.add_param_group({"params": moved, "lr": lr, "weight_decay": 0.0})


register_optimizer_step_pre_hook(_warn_about_decay)
