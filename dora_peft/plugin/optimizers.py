"""Patches of PEFT's optimizer helpers, which know A and B alone: m gets the common learning rate and no decay.

Versions 0.20.0 to 0.21.2:

    create_loraplus_optimizer   gives every one-dimensional parameter B's rate, lr * loraplus_lr_ratio, as biases; it
                                looks for PEFT's embeddings alone
    create_lorafa_optimizer     takes the parameters with "lora" in their names in pairs, as A and B in turn. m is one
                                as well, so that from the first layer on it would take m for A
"""

from __future__ import annotations

from typing import cast

import peft.optimizers.loraplus
from peft import PeftModel
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from torch import nn
from torch.optim import Optimizer

from ..layers import DoraLayer
from ..layers.embedding import Embedding
from ..layers.linear import Linear
from ..optim import at_common_rate
from .patching import Function, patch_everywhere


def install() -> None:
    """Patch both functions."""
    patch_everywhere("create_loraplus_optimizer", _loraplus)
    patch_everywhere("create_lorafa_optimizer", _lorafa)
    peft.optimizers.loraplus.Embedding = (PeftEmbedding, Embedding)  # type: ignore[misc, assignment]


def _loraplus(original: Function) -> Function:
    def create_loraplus_optimizer(model: PeftModel, *args: object, lr: float, **kwargs: object) -> Optimizer:
        optimizer = original(model, *args, lr=lr, **kwargs)
        at_common_rate(optimizer, model, lr)
        return optimizer

    return create_loraplus_optimizer


def _lorafa(original: Function) -> Function:
    def create_lorafa_optimizer(model: PeftModel, *args: object, **kwargs: object) -> Optimizer:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, DoraLayer)}
        if not layers:
            return original(model, *args, **kwargs)
        pairs = _pairs(model, layers)
        optimizer = original(model, *args, **kwargs)
        _regroup(optimizer, model, pairs)
        return optimizer

    return create_lorafa_optimizer


# A or B, its name for the optimizer, and s.
Entry = tuple[nn.Parameter, str, float]


def _pairs(model: PeftModel, layers: dict[str, DoraLayer]) -> list[Entry]:
    """A and B of each layer in turn, under names that tell the optimizer which they are.

    Raises:
        ValueError: LoRA-FA is not defined for what the model holds.
    """
    active = [name for name in model.active_adapters if name in model.peft_config]
    if len(active) != 1:
        raise ValueError(f"LoRA-FA trains one active adapter, found {len(active)}: {', '.join(active)}. Activate one.")
    pairs: list[Entry] = []
    for name, layer in layers.items():
        if active[0] not in layer.lora_magnitude_vector or layer.magnitude_only[active[0]]:
            continue
        factors = layer.factor_parameters(active[0])
        if not isinstance(layer, Linear) or not all(isinstance(factor, nn.Parameter) for factor in factors):
            what = "masked or parametrized" if isinstance(layer, Linear) else type(layer.get_base_layer()).__name__
            raise ValueError(
                f"LoRA-FA projects the gradient of B [out, r] by A [r, in] as they are stored in linear layers; module "
                f"'{name}' is {what}. Leave it out of target_modules, or use torch.optim.AdamW with "
                "dora_peft.param_groups."
            )
        # the optimizer tells A and B from others by the first "lora" in a name, and layers by what is before
        own, scaling = name.replace("lora", "lo_ra"), float(layer.scaling[active[0]])
        pairs += [(factors[0], f"{own}.lora_A", scaling), (factors[1], f"{own}.lora_B", scaling)]
    return pairs


def _regroup(optimizer: Optimizer, model: PeftModel, pairs: list[Entry]) -> None:
    """Give the optimizer the pairs, then all that is not an adapter's, then the magnitudes without decay."""
    group = optimizer.param_groups[0]
    at_common_rate(optimizer, model, group["lr"])
    paired = {id(parameter) for parameter, _, _ in pairs}
    adapters = {id(p) for m in model.modules() if isinstance(m, DoraLayer) for p in _tensors_of(m)}
    others = [p for p in model.parameters() if id(p) not in paired | adapters and p.requires_grad]
    entries = [*pairs, *((p, f"other.{number}", 1.0) for number, p in enumerate(others))]
    group["params"] = [parameter for parameter, _, _ in entries]
    group["names"] = [name for _, name, _ in entries]
    group["scaling_factors"] = [scaling for _, _, scaling in entries]
    for own in optimizer.param_groups[1:]:
        trained = [p for p in own["params"] if p.requires_grad]
        own["params"], own["names"] = trained, [f"magnitude.{number}" for number in range(len(trained))]
        own["scaling_factors"] = [1.0] * len(trained)


def _tensors_of(layer: DoraLayer) -> list[nn.Parameter]:
    names = layer.adapter_layer_names
    return [p for name in names for p in cast(nn.Module, getattr(layer, name)).parameters()]
