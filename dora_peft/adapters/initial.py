"""An adapter whose initialisation changed W0 (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), rewritten for the unchanged W0.

These initialisations move s B0 A0 out of the base weight. With the trained A and B,

    W_res + s B A = W0 + s (B A - B0 A0) = W0 + s [B, -B0] [A; A0]

so that [A; A0] and [B, -B0] are the factors over W0. The composed weight is the same, and so the magnitude is as well.
"""

from __future__ import annotations

import copy

import torch
from peft.utils import save_and_load
from torch import Tensor, nn

from .._row_ranges import bare, to_mask
from ..config import DoraConfig
from .names import exactly
from .undo import remember


def remember_weight(base: nn.Module, config: DoraConfig) -> None:
    """Keep a base weight that the initialisation is about to change, on the CPU, until the adapter has been created."""
    changes_base = isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"
    weight = base._parameters.get("weight")
    if config.init_lora_weights == "corda" and "eigens" in vars(base):
        # divided by s in place; the undoing of a failure brings back the object that it finds now
        vars(base)["eigens"] = copy.deepcopy(vars(base)["eigens"])
    if changes_base and weight is not None and not weight.is_meta and weight.is_floating_point():
        remember(weight, weight.detach().to("cpu", copy=True))


def subtract_initial(trained: dict[str, Tensor], initial: dict[str, Tensor], config: DoraConfig) -> dict[str, Tensor]:
    """A checkpoint's tensors over the unchanged base weight, of twice the rank.

    Args:
        trained, initial: The adapter's tensors after and before training, A [r, in] and B [out, r].
        config: Its config, which says what the tensors were given for plain PEFT alone.

    Raises:
        ValueError: The initial adapter lacks a tensor.
    """
    out = {}
    for key, tensor in trained.items():
        module = bare(key.rpartition(".lora_")[0])
        if "lora_" not in key or "lora_magnitude_vector" in key or exactly(module) in config.magnitude_only_ranks:
            # Magnitude-only modules have zero factors, up to entries for plain PEFT, and keep their rank.
            out[key] = tensor
            continue
        if key not in initial:
            raise ValueError(f"Expected the initial adapter to have the tensor '{key}', found {len(initial)} others.")
        start = initial[key].to(tensor)
        is_A = "lora_A" in key or "lora_embedding_A" in key
        tied = None if is_A else to_mask((config.tied_rows or {}).get(module, []), start.shape[0])
        if tied is not None:
            # All that B0 has there is the entry for plain PEFT, which could cancel the one of the trained B.
            start = torch.where(tied.to(start.device).view(-1, *(1 for _ in start.shape[1:])), 0, start)
        out[key] = torch.cat([tensor, start if is_A else -start], dim=0 if is_A else 1)
    return out


def subtract_loaded_initial(
    tuner: nn.Module, trained: dict[str, Tensor], initial_name: str, config: DoraConfig
) -> dict[str, Tensor]:
    """`subtract_initial` with an initial adapter that PEFT 0.20 has loaded into the model beside the trained one.

    Args:
        tuner: The DoraModel that holds both.
        trained: The trained adapter's tensors.
        initial_name: The name of the initial adapter.
        config: The initial adapter's config.
    """
    # Looked up in its module at each call, so that the patch of plugin/peft_020.py is taken.
    initial = save_and_load.get_peft_model_state_dict(tuner, adapter_name=initial_name)
    config = copy.copy(config)
    # Asked of the tuner, the record names modules from there; the base model is its attribute `model`.
    config.tied_rows = {name.removeprefix("model."): rows for name, rows in (config.tied_rows or {}).items()}
    return subtract_initial(trained, {f"base_model.{key}": value for key, value in initial.items()}, config)
