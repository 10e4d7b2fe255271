"""The contenders of `scripts/benchmark.py`: equal adapters over shared base weights, and the check that they agree.

All contenders of a run share one frozen base model and get the same random A, B and magnitudes, so that LoRA computes
the same as its floor, and every DoRA the same as every other; `check_equal` makes sure of it before anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from torch import Tensor, nn

import dora_peft
from benchmarks.bases import OneLinear, share_weights

# Kind of adapter, and what the contender's results must equal; "base" is LoRA's model with its adapter disabled.
CONTENDERS: dict[str, tuple[str, list[str]]] = {
    "lora": ("lora", []),
    "peft_dora": ("peft_dora", []),
    "peft_dora_cached": ("peft_dora", ["peft_dora"]),
    "dora": ("dora", ["peft_dora"]),
    "dora:torch": ("dora", ["peft_dora", "dora"]),
    "dora:reference": ("dora", ["peft_dora", "dora"]),
    "dora:triton": ("dora", ["peft_dora", "dora"]),
    "lora_idle": ("lora", ["lora"]),
    "dora_idle": ("dora", ["dora"]),
    "frozen": ("frozen", ["base"]),
    "lora_floor": ("floor", ["lora"]),
    "lora_compiled": ("lora", ["lora"]),
    "dora_compiled": ("dora", ["dora"]),
}
# Relative difference (Frobenius norm) allowed per base dtype, of a loss and of any other tensor. Found on two layers:
# 1e-7 and 6e-7 in fp32, 1e-5 and 2e-2 in bf16, where PEFT rounds its norm to 8 bits; depth and width add to that.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 1e-1)}
Results = dict[str, Tensor]
# Adapters beside the active one of an "_idle" contender.
IDLE = 40


class _Floor(torch.autograd.Function):
    """y = x W0^T + b + x_d A^T B^T with the products that this needs and no others; x_d is x if it is None.

    after_A = x_d A^T       dB = g^T after_A       dA = (g B)^T x_d       dx_d = (g B) A       dx = g W0
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_A, lora_B):
        # [..., out]
        y = F.linear(x, weight, bias)
        # [N, r]
        after_A = F.linear(x if dropped is None else dropped, lora_A.to(x.dtype)).flatten(0, -2)
        y.view(-1, y.shape[-1]).addmm_(after_A, lora_B.to(x.dtype).T)
        ctx.save_for_backward(x if dropped is None else dropped, weight, lora_A, lora_B, after_A)
        ctx.shared = dropped is None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, lora_A, lora_B, after_A = ctx.saved_tensors
        # [N, out]
        flat = grad.flatten(0, -2)
        # [N, r]
        grad_after_A = flat @ lora_B.to(x.dtype)
        # [r, in]
        grad_A = (grad_after_A.T @ x.flatten(0, -2)).to(lora_A.dtype)
        # [out, r]
        grad_B = (flat.T @ after_A).to(lora_B.dtype)
        A = lora_A.to(x.dtype)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            # [N, in]
            grad_x = flat @ weight
            if ctx.shared:
                grad_x.addmm_(grad_after_A, A)
            else:
                grad_dropped = (grad_after_A @ A).view_as(x)
            grad_x = grad_x.view_as(x)
        return grad_x, grad_dropped, None, None, grad_A, grad_B


class FloorLinear(nn.Module):
    """A linear layer with a low-rank branch, at the least that LoRA can cost; `lora_B` contains the scaling."""

    def __init__(self, base_layer: nn.Linear, lora_A: Tensor, lora_B: Tensor, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.lora_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.lora_dropout(x) if self.training and self.lora_dropout.p > 0 else None
        base = self.base_layer
        return _Floor.apply(x, dropped, base.weight, base.bias, self.lora_A, self.lora_B)


@dataclass
class Contender:
    """One model among those compared.

    Attributes:
        module: The eager model, for its parameters.
        call: What is timed; the compiled model of a compiled contender, else `module`.
        context: Entered around every call.
        scaling: What a gradient of `lora_B` is multiplied with, if B contains the scaling.
    """

    name: str
    module: Any
    call: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]]
    scaling: float = 1.0

    def gradients(self) -> Results:
        """The adapter's gradients under names that all contenders share."""
        found = {}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and "lora_" in name:
                name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
                found[name] = parameter.grad * (self.scaling if name.endswith("lora_B") else 1.0)
        return found


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a contender cannot run on this machine, None if it can as far as is known before it runs."""
    if name.startswith("dora:"):
        try:
            with dora_peft.implementation(name.partition(":")[2]):
                return None
        except Exception as error:
            # whatever the reason, it is the note
            return f"{type(error).__name__}: {error}"
    if name.endswith("_compiled") and device.type == "cpu":
        compilers = [os.environ.get("CXX", "g++"), "clang++"]
        if not any(map(shutil.which, compilers)):
            return f"torch.compile needs a C++ compiler on a CPU, found none of {', '.join(compilers)}"
    return None


def build_contender(
    name: str,
    base: nn.Module,
    *,
    rank: int,
    dropout: float,
    adapter_dtype: torch.dtype,
    seed: int,
    targets: str | list[str] = "all-linear",
) -> Contender:
    """A contender on the weights of `base`, which it shares, in training mode; alpha is twice the rank."""
    kind, _ = CONTENDERS[name]
    model: Any = share_weights(base)
    scaling, context = 1.0, contextlib.nullcontext
    if kind == "floor":
        scaling = 2.0
        for path, linear in find_linears(model):
            lora_A, lora_B, _ = random_adapter(path, linear, rank, seed)
            lora_A, lora_B = (t.to(linear.weight.device, adapter_dtype) for t in (lora_A, lora_B))
            model.set_submodule(path, FloorLinear(linear, lora_A, lora_B * scaling, dropout))
    elif kind != "frozen":
        config: Any = (
            dora_peft.DoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets)
            if kind == "dora"
            else LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                lora_dropout=dropout,
                target_modules=targets,
                use_dora=kind == "peft_dora",
            )
        )
        # PEFT's default puts the adapter into fp32 over a bf16 base; False leaves it in the base's dtype.
        model = get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
        for number in range(IDLE if name.endswith("_idle") else 0):
            model.add_adapter(f"idle{number}", copy.deepcopy(config))
        fill_adapter(model, rank, seed)
    model.train()
    if name.startswith("dora:"):
        implementation = name.partition(":")[2]

        def context() -> AbstractContextManager[Any]:
            return dora_peft.implementation(implementation)

    elif name == "peft_dora_cached":
        context = DoraCaching
    # One layer is called without the PeftModel around it, whose hooks would weigh more than in a whole model.
    call = model.base_model.model if isinstance(base, OneLinear) and isinstance(model, PeftModel) else model
    if name.endswith("_compiled"):
        call = torch.compile(call)
    return Contender(name, model, call, context, scaling)


def find_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers that "all-linear" means: every linear layer but the output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]


def random_adapter(path: str, linear: nn.Linear, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, in], B [out, r] and magnitude [out] of a layer, the same for every contender; fp32 on the CPU.

    A is uniform as PEFT initialises it, B is normal with standard deviation 0.02, and the magnitude is the norm of W0
    times factors of 0.9 to 1.1: an adapter in the middle of training.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(path.encode()))
    out_features, in_features = linear.weight.shape
    lora_A = torch.empty(rank, in_features).uniform_(-1, 1, generator=generator) / in_features**0.5
    lora_B = torch.empty(out_features, rank).normal_(std=0.02, generator=generator)
    factor = torch.empty(out_features).uniform_(0.9, 1.1, generator=generator)
    return lora_A, lora_B, linear.weight.detach().float().norm(dim=1).cpu() * factor


@torch.no_grad()
def fill_adapter(model: Any, rank: int, seed: int) -> None:
    """Write `random_adapter` into every adapted layer of a PEFT model."""
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")]
    for path, layer in layers:
        lora_A, lora_B, magnitude = random_adapter(path.removeprefix("base_model.model."), layer.base_layer, rank, seed)
        layer.lora_A["default"].weight.copy_(lora_A)
        layer.lora_B["default"].weight.copy_(lora_B)
        if "default" in getattr(layer, "lora_magnitude_vector", ()):
            layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
    dora_peft.refresh(model)


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Set every nn.Dropout to 0 for a while; the module stays in training mode."""
    dropouts = [(m, m.p) for m in module.modules() if isinstance(m, nn.Dropout)]
    try:
        for dropout, _ in dropouts:
            dropout.p = 0.0
        yield
    finally:
        for dropout, p in dropouts:
            dropout.p = p


def check_equal(results: Mapping[str, Results], dtype: str) -> dict[str, dict[str, Any]]:
    """Compare each contender with those that it has to equal, tensor by tensor.

    Args:
        results: For each contender its loss or output and gradients; "base" for the model without adapter.
        dtype: "fp32" or "bf16", which chooses the tolerance.

    Returns:
        For each checked contender the tensor that differs most, from whose, and by how much.

    Raises:
        RuntimeError: naming contender and tensor, if one differs by more than the tolerance or is missing.
    """
    worst: dict[str, dict[str, Any]] = {}
    for name in results:
        for other in CONTENDERS.get(name, ("", []))[1]:
            if other not in results:
                continue
            if results[name].keys() != results[other].keys():
                missing = ", ".join(sorted(results[name].keys() ^ results[other].keys()))
                raise RuntimeError(f"{name}: only one of it and {other} has the tensors {missing}.")
            for tensor, expected in results[other].items():
                error = relative_error(results[name][tensor], expected)
                allowed = TOLERANCE[dtype][0 if "loss" in tensor else 1]
                if not error <= allowed:
                    raise RuntimeError(
                        f"{name}: its {tensor} differs from that of {other} by {error:.1e}, more than the "
                        f"{allowed:.0e} allowed for {dtype}; the figures cannot be compared."
                    )
                if name not in worst or error > worst[name]["error"]:
                    worst[name] = {"error": error, "tensor": tensor, "against": other, "allowed": allowed}
    return worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN if either has one."""
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()
