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
    magnitudes = {id(m.weight) for m in model.modules() if isinstance(m, Magnitude)}
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
    decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
    if decayed and any(id(m.weight) in decayed for m in Magnitude.all()):
        warnings.warn(
            "The optimizer applies weight decay to DoRA magnitudes, which shrinks the adapted weights themselves. "
            "Build it from dora_peft.param_groups(model, weight_decay=...) to leave them out.",
            stacklevel=2,
        )


register_optimizer_step_pre_hook(_warn_about_decay)
