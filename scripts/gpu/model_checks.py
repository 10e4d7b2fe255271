"""Whole models: as PEFT's DoRA, as torch's operations, with checkpointing, merged, with two adapters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import dora_peft
from benchmarks.bases import Shape, build_base
from benchmarks.contenders import Contender, build_contender, relative_error
from benchmarks.measure import enable_checkpointing
from gpu.problem import BF16, FLOOR, FP32, Problem, distance
from gpu.registry import Figures

TINY = Shape(64, 128, 4, 2, 2, 128)


def tokens(device: torch.device) -> Tensor:
    return torch.randint(128, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)


def contender(name: str, device: torch.device, dtype: torch.dtype) -> Contender:
    base = build_base(TINY, 1, 128, dtype, device, 0)
    return build_contender(name, base, rank=16, dropout=0.0, adapter_dtype=dtype, seed=0)


def gradients(model: Contender, ids: Tensor) -> dict[str, Tensor]:
    """Loss and the adapter's gradients."""
    model.module.zero_grad()
    loss = model.call(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **model.gradients()}


def add_all(figures: Figures, found: dict[str, Tensor], expected: dict[str, Tensor], allowed: float) -> None:
    """The worst tensor's error."""
    figures.require("the same tensors", found.keys() == expected.keys())
    for name in found.keys() & expected.keys():
        figures.add("loss" if name == "loss" else "gradients", relative_error(found[name], expected[name]), allowed)


def model_like_peft(device: torch.device, figures: Figures) -> None:
    ours, theirs = (gradients(contender(name, device, FP32), tokens(device)) for name in ("dora", "peft_dora"))
    add_all(figures, ours, theirs, 5e-5)


def model_trains_like_torch(device: torch.device, figures: Figures) -> None:
    """Three steps of AdamW by the kernels, and by torch's operations."""
    losses = []
    for implementation in (dora_peft.ops.choice.selected, "torch"):
        with dora_peft.implementation(implementation):
            model = contender("dora", device, FP32)
            optimizer = torch.optim.AdamW(dora_peft.param_groups(model.module, 0.0), lr=1e-3)
            found = []
            for _ in range(3):
                found.append(gradients(model, tokens(device))["loss"])
                optimizer.step()
            losses.append(torch.stack(found))
    figures.add("losses", distance(*losses), 1e-5)
    figures.require("it learns", bool(losses[0][-1] < losses[0][0]))


def model_with_checkpointing(device: torch.device, figures: Figures) -> None:
    model = contender("dora", device, BF16)
    model.module.enable_input_require_grads()
    expected = gradients(model, tokens(device))
    enable_checkpointing(model.module)
    add_all(figures, gradients(model, tokens(device)), expected, 0.0)


@torch.no_grad()
def model_merged(device: torch.device, figures: Figures) -> None:
    """Merged, unmerged, and merged for good."""
    model = contender("dora", device, FP32).module.eval()
    ids = tokens(device)
    before = model(input_ids=ids).logits
    base = copy.deepcopy({name: p for name, p in model.named_parameters() if "base_layer" in name})
    model.merge_adapter()
    figures.add("merged", distance(model(input_ids=ids).logits, before), 1e-5)
    model.unmerge_adapter()
    rest = {name: p for name, p in model.named_parameters() if name in base}
    figures.require("unmerged bit for bit", all(torch.equal(rest[name], base[name]) for name in base))
    figures.add("unmerged", distance(model(input_ids=ids).logits, before), 1e-5)
    figures.add("merged for good", distance(model.merge_and_unload()(input_ids=ids).logits, before), 1e-5)


def model_with_two_adapters(device: torch.device, figures: Figures) -> None:
    problem = Problem(device, BF16)
    problem.compare(figures, label="first: ")
    first = problem.run()[0]
    config = dora_peft.DoraConfig(r=16, lora_alpha=16, target_modules=["linear"], init_lora_weights=False)
    problem.model.add_adapter("second", config)
    problem.model.set_adapter("second")
    A, B, m = (tensor.detach().double() for tensor in problem.trained("second"))
    base, x = problem.layer.get_base_layer(), problem.x.detach().double()
    scaling = problem.layer.scaling["second"]
    true = dora_peft.reference.dora_linear(
        x, base.weight.detach().double(), A, B, m, scaling, base.bias.detach().double()
    )
    figures.add("second: y", distance(problem.model(problem.x).detach(), true), 2 * FLOOR[BF16])
    problem.model.set_adapter("default")
    figures.require("first again, bit for bit", torch.equal(problem.run()[0], first))
