"""Training memory of LoRA, DoRA with the norm detached and not, and full fine-tuning, on LLaMA-7B and VL-BART.

Called by `scripts/reproduce.py memory`. The paper saves 24.4 % on LLaMA-7B and 12.4 % on VL-BART by treating the norm
as a constant in the backward pass (sec. 4.3). That claim lives in the dense algorithm, which keeps W0 + s B A of each
module for the norm's gradient; so it is measured on `dora_peft/reference.py`, and this package beside it, whose
factored norm has little to save.

At full size, on a GPU: the real configurations with random weights, all in bf16, and the allocator's peak over a whole
training step. At laptop size, on the CPU: widths and tokens divided by 8, layers by 8 and the vocabulary by 64, so that
each part of the memory shrinks by 512 and the shares stay; weights, gradients, AdamW's moments, and the bytes that are
kept from forward to backward are counted exactly, and their sum is the figure.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmark_common import MIB, replacing, saved_bytes
from benchmark_models import SHAPES, Shape, build_base, share_weights
from dora_peft import DoraConfig, param_groups, reference
from reproduce_common import Options, Runs
from vl_bart_model import build_vl_bart, random_batch

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA (PEFT)",
    "peft_dora": "DoRA (PEFT)",
    "reference_not_detached": "DoRA, dense,\nnorm not detached",
    "reference": "DoRA, dense,\nnorm detached",
    "dora_not_detached": "DoRA (ours),\nnorm not detached",
    "dora": "DoRA (ours)",
}
TITLES = {"llama": "LLaMA-7B", "vl_bart": "VL-BART"}
PAPER = {  # GB
    "llama": {"reference_not_detached": 37.3, "reference": 28.2},
    "vl_bart": {"reference_not_detached": 23.4, "reference": 20.5},
}
_7B = SHAPES["llama-7b"]
LLAMA = {
    "full": _7B,
    "laptop": Shape(_7B.hidden // 8, _7B.intermediate // 8, _7B.heads // 8, _7B.kv_heads // 8, 4, _7B.vocab // 64),
    "toy": SHAPES["tiny"],
}
# Batch and length: the paper's setting first, the sweeps after it.
LLAMA_SETTINGS = {
    "full": [(16, 256), (4, 256), (8, 256), (32, 256), (16, 128), (16, 512)],
    "laptop": [(8, 64), (2, 64), (4, 64), (16, 64), (8, 32), (8, 128)],
    "toy": [(2, 8), (2, 16)],
}
BART_SETTINGS = {"full": [(300, 20), (150, 20), (300, 40)], "laptop": [(38, 20), (19, 20), (38, 40)], "toy": [(2, 6)]}


@dataclass(frozen=True)
class Family:
    """A model of the paper and how it was trained there."""

    build: Callable[[torch.device], nn.Module]
    batch: Callable[[Any, int, int, torch.device], dict[str, Tensor]]
    targets: list[str]
    rank: int
    alpha: float
    dropout: float
    settings: list[tuple[int, int]]  # batch and length; the first one is the paper's


class ReferenceLinear(nn.Module):
    """A linear layer by `reference.dora_linear`, whose dense W0 + s B A autograd keeps where the norm has a gradient.

    Dropout acts as in the paper's code, on both branches.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float, detach_norm: bool) -> None:
        super().__init__()
        weight = base_layer.weight
        self.base_layer, self.scaling, self.detach_norm = base_layer, alpha / rank, detach_norm
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        self.magnitude = nn.Parameter(weight.detach().norm(dim=1))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        return reference.dora_linear(
            x, base.weight, self.lora_A, self.lora_B, self.magnitude, self.scaling, base.bias,
            dropped=self.lora_dropout(x) if self.lora_dropout.p else None, dropout_mode="paper",
            detach_norm=self.detach_norm,
        )  # fmt: skip


def families(options: Options) -> dict[str, Family]:
    """The two models at the size asked for."""
    size = "toy" if options.dry_run else options.size
    llama, shrink = LLAMA[size], 1 if size == "full" else 8  # ranks shrink with the widths
    dtype = torch.bfloat16

    def build_llama(device: torch.device) -> nn.Module:
        return build_base(llama, llama.layers, llama.vocab, dtype, device, 0)

    def llama_batch(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
        ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}  # type: ignore[dict-item]

    def build_bart(device: torch.device) -> nn.Module:
        return build_vl_bart(size).to(device, dtype).requires_grad_(False)

    def bart_batch(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
        found = random_batch(model.config, batch, length, 5, device)
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}

    return {
        "llama": Family(
            build_llama, llama_batch, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            32 // shrink, 64 / shrink, 0.05, LLAMA_SETTINGS[size],
        ),
        "vl_bart": Family(
            build_bart, bart_batch, ["q_proj", "v_proj"], 128 // shrink, 128 / shrink, 0.0, BART_SETTINGS[size],
        ),
    }  # fmt: skip


def adapted_linears(model: nn.Module, targets: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            yield name, module


def attach(method: str, base: nn.Module, family: Family) -> Any:
    """`base` as `method` trains it; its weights are shared with all other methods but in full fine-tuning."""
    model: Any = share_weights(base)
    common: dict[str, Any] = {
        "r": family.rank, "lora_alpha": family.alpha, "lora_dropout": family.dropout, "target_modules": family.targets,
    }  # fmt: skip
    if method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    elif method.startswith("reference"):
        for name, linear in list(adapted_linears(model, family.targets)):
            layer = ReferenceLinear(linear, family.rank, family.alpha, family.dropout, method == "reference")
            model.set_submodule(name, layer)
    else:
        config: Any
        if method.startswith("dora"):
            config = DoraConfig(**common, detach_norm=method == "dora")
        else:
            config = LoraConfig(**common, use_dora=method == "peft_dora")
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model.train()


def measure(
    method: str, base: nn.Module, family: Family, batch: int, length: int, device: torch.device
) -> dict[str, Any]:
    """Bytes of a training step with AdamW.

    Returns:
        `total_mib`, on a GPU the allocator's peak, on the CPU the sum of the others: `weights_mib`, `gradients_mib`,
        `optimizer_mib`, `saved_mib`, of which the last is what is kept from forward to backward.
    """
    torch.manual_seed(0)
    model = attach(method, base, family)
    inputs = family.batch(base, batch, length, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, 0.0), lr=1e-4)
    gradients = sum(p.nbytes for p in trained)
    found = {
        "weights_mib": sum(p.nbytes for p in model.parameters()) / MIB,
        "gradients_mib": gradients / MIB,
        "optimizer_mib": 2 * gradients / MIB,
        "trained": sum(p.numel() for p in trained),
    }

    def forward() -> Tensor:
        return model(**inputs).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        if device.type == "cuda":
            step()  # makes the optimizer's moments, and tunes
            before = torch.cuda.memory_allocated()
            loss = forward()
            found["saved_mib"] = (torch.cuda.memory_allocated() - before) / MIB
            del loss
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            found["total_mib"] = torch.cuda.max_memory_allocated() / MIB
        else:
            forward().backward()
            found["saved_mib"] = saved_bytes(forward) / MIB
            found["total_mib"] = sum(found[f"{part}_mib"] for part in ("weights", "gradients", "optimizer", "saved"))
    finally:
        for parameter in base.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        gc.collect()
    return found


def run(options: Options) -> None:
    """Measure every method at the paper's setting and around it, store the figures, and draw them."""
    device, cases = options.device, families(options)
    if options.size == "full" and device.type != "cuda" and not options.dry_run:
        raise ValueError("memory --size full: expected a GPU, found none. Use --size laptop on the CPU.")
    runs = Runs("memory", options, {"measured": "allocator's peak" if device.type == "cuda" else "sum of exact bytes"})
    total = sum(len(METHODS) * len(family.settings) for family in cases.values())
    predicted = {}
    for name, family in cases.items():
        base = family.build(device)
        copies = sum(linear.weight.nbytes for _, linear in adapted_linears(base, family.targets))
        predicted[name] = copies / MIB
        for batch, length in family.settings:
            for method in METHODS:
                case = (method, base, family, batch, length, device)
                runs.do(f"{name} {batch} x {length} {method}", lambda case=case: measure(*case), total)
        del base
    summary = {name: summarise(runs.runs, name, family, predicted[name]) for name, family in cases.items()}
    runs.finish(summary)
    path = runs.path.with_suffix(".png")
    draw(summary, runs.content, path)
    for name, found in summary.items():
        print(
            f"{TITLES[name]}: detaching saves {found['saving_percent']['reference']:.1f} % on the dense algorithm "
            f"(paper {found['paper_percent']:.1f} %, predicted from shapes {found['predicted_percent']:.1f} %), "
            f"{found['saving_percent']['dora']:.1f} % on ours"
        )
    print(f"wrote {path}")


def summarise(runs: Mapping[str, Any], name: str, family: Family, copies_mib: float) -> dict[str, Any]:
    """Totals of each method at each setting, and what detaching saves at the paper's, measured and predicted.

    The prediction is one dense copy of W0 + s B A, in the base's dtype, for each adapted module.
    """
    table = {
        f"{batch} x {length}": {method: runs[f"{name} {batch} x {length} {method}"]["total_mib"] for method in METHODS}
        for batch, length in family.settings
    }
    first = next(iter(table.values()))
    paper = PAPER[name]

    def saving(values: Mapping[str, float], method: str) -> float:
        return 100 * (1 - values[method] / values[f"{method}_not_detached"])

    return {
        "total_mib": table,
        "setting": next(iter(table)),
        "saving_percent": {method: saving(first, method) for method in ("reference", "dora")},
        "saving_percent_by_setting": {setting: saving(values, "reference") for setting, values in table.items()},
        "paper_percent": saving(paper, "reference"),
        "predicted_mib": copies_mib,
        "predicted_percent": 100 * copies_mib / first["reference_not_detached"],
        "ours_to_lora": first["dora"] / first["lora"],
    }


def draw(summary: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> None:
    """Memory at the paper's setting in per cent of the dense algorithm without detaching, and the saving by setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    figure.suptitle(
        f"Training memory, {content['size']} size, {content['machine']['device']}: {content['settings']['measured']}"
    )
    for row, (name, found) in zip(figure.subplots(2, 2, width_ratios=[3, 2]), summary.items(), strict=True):
        values = found["total_mib"][found["setting"]]
        whole, paper = values["reference_not_detached"], PAPER[name]
        places = range(len(METHODS))
        bars = row[0].bar([p - 0.2 for p in places], [100 * values[m] / whole for m in METHODS], 0.4, label="measured")
        row[0].bar_label(bars, [format_size(values[m]) for m in METHODS], fontsize=8)
        known = [p for p, m in enumerate(METHODS) if m in paper]
        heights = [100 * paper[m] / paper["reference_not_detached"] for m in METHODS if m in paper]
        bars = row[0].bar([p + 0.2 for p in known], heights, 0.4, label="paper")
        row[0].bar_label(bars, [f"{paper[m]:.1f}\nGB" for m in METHODS if m in paper], fontsize=8)
        row[0].set_xticks(list(places), METHODS.values(), fontsize=7.5)
        row[0].set(title=f"{TITLES[name]}, batch x length {found['setting']}", ylabel="% of dense, not detached")
        row[0].margins(y=0.2)
        row[0].legend(loc="upper right")
        by_setting = found["saving_percent_by_setting"]
        bars = row[1].bar(range(len(by_setting)), by_setting.values(), 0.6, color="tab:green")
        row[1].bar_label(bars, fmt="%.1f", fontsize=8)
        row[1].axhline(found["paper_percent"], color="tab:orange", linestyle="--", label="paper")
        row[1].set_xticks(range(len(by_setting)), by_setting)
        row[1].set(title="saved by detaching, dense algorithm", xlabel="batch x length", ylabel="%")
        row[1].margins(y=0.15)
        row[1].legend(loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def format_size(mib: float) -> str:
    return f"{mib / 953.67:.1f}\nGB" if mib >= 1000 else f"{mib:.1f}\nMiB"  # 10^9 bytes as in the paper
