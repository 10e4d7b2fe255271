"""Adapters and bases for the tests of other tools' formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_peft
from dora_peft import DoraConfig, reference
from dora_peft.adapters.formats import Adapter, Module

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
# torchtune and mlx name the modules of a LLaMA alone.
ROWS = {"self_attn.q_proj": 12, "self_attn.k_proj": 6, "self_attn.v_proj": 7, "self_attn.o_proj": 9, "mlp.down_proj": 5}
NEEDS_BASE = ("torchtune", "trtllm", "comfyui-2026")


def llama() -> LlamaForCausalLM:
    """Two blocks, 24 wide, with two heads of 12 for q and one for k."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, vocab_size=32, head_dim=12, **HEADS
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def shaken(model: PeftModel) -> PeftModel:
    """The same with A, B and m as after training: B A moves norms by half a percent, and m by one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                size = 0.1 if "lora_A" in name else 0.005
                parameter.copy_(parameter * (1 + 0.01 * noise) if "magnitude" in name else size * noise)
    return model


def saved(folder: Path, model: nn.Module | None = None, **options: object) -> Path:
    """An adapter of ours as a folder."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    shaken(get_peft_model(llama() if model is None else model, DoraConfig(**options))).save_pretrained(folder)
    return folder


def logits(folder: str | Path, model: nn.Module | None = None) -> Tensor:
    """What a model gives with the adapter in a folder of PEFT's format."""
    adapted = PeftModel.from_pretrained(llama() if model is None else model, folder).eval()
    with torch.no_grad(), dora_peft.implementation("torch"):
        return adapted(torch.arange(10)[None]).logits


def module(
    out: int, columns: int, rank: int, alpha: float, dtype: torch.dtype = torch.float32, kernel: tuple[int, ...] = (),
    seed: int = 0,
) -> Module:  # fmt: skip
    """A module with random factors and magnitudes near 1."""
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, columns, *kernel, generator=generator).to(dtype)
    lora_B = 0.1 * torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    magnitude = (1 + 0.1 * torch.randn(out, generator=generator)).to(dtype)
    return Module(lora_A, lora_B.to(dtype), alpha, magnitude)


def adapter(columns: int, rank: int, alpha: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """Of one block of a LLaMA, with rows that fit its heads and odd ones elsewhere."""
    return Adapter(
        {
            f"model.layers.0.{name}": module(out, columns, rank, alpha, dtype, seed=seed + i)
            for i, (name, out) in enumerate(ROWS.items())
        }
    )


def base_for(adapter: Adapter, seed: int = 7) -> nn.Module:
    """A base with a weight for each of an adapter's modules."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    root.config = SimpleNamespace(to_dict=lambda: {"model_type": "llama", **HEADS}, _name_or_path="the base")
    for path, one in adapter.modules.items():
        *parents, name = path.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        shape = (one.out_features, *one.lora_A.shape[1:])
        kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
        layer = kinds[len(shape)](shape[1], shape[0], *([shape[2:]] if shape[2:] else []), bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(shape, generator=generator))
        holder.add_module(name, layer)
    return root


def effective(weight: Tensor, one: Module) -> Tensor:
    """W' [out, in] in fp64, by reference.py."""
    lora_A, lora_B = one.matrices()
    assert one.magnitude is not None
    return reference.dora_weight(
        weight.flatten(1).double(), lora_A.double(), lora_B.double(), one.magnitude.double(), one.scaling
    )


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units in the last place of the expected numbers."""
    unit = torch.nextafter(expected.abs(), torch.full_like(expected, torch.inf)).double() - expected.abs().double()
    return ((found.double() - expected.double()).abs() / unit).max().item()


def weights(model: nn.Module) -> Mapping[str, Tensor]:
    return {name.removesuffix(".weight"): parameter.detach() for name, parameter in model.named_parameters()}
