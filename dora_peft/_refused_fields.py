"""LoraConfig fields and initialisations that have no meaning for DoRA, each with the reason."""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from typing import TypeVar

from peft import LoraConfig

Config = TypeVar("Config")

# Accepted at PEFT's default only.
REFUSED = {
    "use_dora": "this class always is DoRA; a plain LoRA adapter is a peft.LoraConfig",
    "target_parameters": "a bare nn.Parameter has no base product whose output could be rescaled",
    "lora_bias": "a bias on lora_B is outside of m * (W0 + s B A) / ||W0 + s B A||",
    "megatron_config": "PEFT's DoRA does not support Megatron layers either",
    "use_qalora": "it pools the input, so its A does not have W0's input dimension and no norm ||W0 + s B A|| exists",
    "velora_config": "it replaces the stored input of the gradient, PEFT cannot combine it with DoRA",
    "alora_invocation_tokens": "it switches the adapter per token, PEFT cannot combine it with DoRA",
    "monteclora_config": "it samples the weights, PEFT cannot combine it with DoRA",
    "use_bdlora": "its factors are block-diagonal, PEFT cannot combine it with DoRA",
    "arrow_config": "it routes between LoRA experts, PEFT cannot combine it with DoRA",
    "kasa_config": "it truncates the base weight and adds a diagonal between B and A, PEFT cannot combine it with DoRA",
    "ensure_weight_tying": (
        "tied layers share A and B transposed, but their magnitudes have different lengths; train one of the two layers"
    ),
    "eva_config": "it belongs to init_lora_weights='eva', which PEFT computes for its own LoRA models only",
    "runtime_config": "ephemeral_gpu_offload belongs to PEFT's dense norm; the factored norm needs no such offload",
}
REFUSED_INIT = {
    "eva": "it is computed by peft.initialize_lora_eva_weights, which accepts PEFT's LoRA models only",
    "mica": "it freezes B, a variant that PEFT cannot combine with DoRA",
}
# Companions of refused fields.
IGNORED = {"qalora_group_size": "use_qalora", "megatron_core": "megatron_config"}
_DEFAULTS = {f.name: f.default for f in fields(LoraConfig)}


def refuse_foreign_fields(cls: type[Config]) -> type[Config]:
    """Have the class give the reason if a LoraConfig field has no meaning here, not 'unexpected keyword argument'."""
    generated = cls.__init__

    @wraps(generated)
    def __init__(self: Config, *args: object, **kwargs: object) -> None:
        for name in (REFUSED.keys() | IGNORED.keys()) & kwargs.keys():
            value = kwargs.pop(name)
            harmless = value in (None, False) if name != "use_dora" else value is True
            harmless = harmless or (name in IGNORED and value == _DEFAULTS[name])
            if harmless or (name == "runtime_config" and not _offloads(value)):
                continue
            reason = REFUSED[IGNORED.get(name, name)]
            raise ValueError(f"DoraConfig does not take {name}={value!r}: {reason}.")
        generated(self, *args, **kwargs)  # type: ignore[arg-type]

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls


def _offloads(runtime_config: object) -> bool:
    if isinstance(runtime_config, dict):
        return bool(runtime_config.get("ephemeral_gpu_offload"))
    return bool(getattr(runtime_config, "ephemeral_gpu_offload", False))
