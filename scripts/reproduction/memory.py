"""Training memory of LoRA, DoRA with the norm detached and not, and full fine-tuning, on LLaMA-7B and VL-BART.

Called by `scripts/reproduce.py memory`. The paper saves 24.4 % on LLaMA-7B and 12.4 % on VL-BART by treating the norm
as a constant in the backward pass (sec. 4.3). That claim lives in the dense algorithm, which keeps W0 + s B A of each
module for the norm's gradient; so it is measured on `dora_peft/reference.py`, and this package beside it, whose
factored norm has little to save. Dropout acts on the base product too, as in the paper's code and PEFT's, but in the
case of our default, which drops the low-rank branch only and keeps less for backward.

At full size, on a GPU: the real configurations with random weights, all in bf16, and the allocator's peak over a whole
training step. What that takes in GiB, estimated from shapes: the laptop's figures times 512 and 64, without gradients,
which come when the activations go, and without short-lived tensors. DoRA (ours) is its default | with paper's dropout.

                            dense  detached, PEFT  ours     LoRA  full
    LLaMA-7B, 4,096 tokens  64     56              41 | 56  42    62    80 GB GPU; the paper's setting, 16 x 256
    LLaMA-7B, 8,192 tokens  107    98              68 | 98  71    86    141 GB GPU; 32 x 256 and 16 x 512
    VL-BART, 300 x 20       4      4               3        3     4     8 GB GPU, as for the rest of its sweep

A case that does not fit is stored as such, left out of the figures, and tried again by the next call.

At laptop size, on the CPU, the figure is the sum of the bytes of weights (with buffers and cached norms), gradients,
AdamW's moments, and all that is kept from forward to backward, each counted exactly in bf16. LLaMA's widths and tokens
are divided by 8, its layers by 8 and its vocabulary by 64, so that each part shrinks by 512 and the shares stay.
VL-BART's widths, batch and vocabulary are divided by 8, while layers and lengths stay: its parts shrink by 64, the
weights by 59, for its position embeddings keep their number. Back at full size that is 4 GiB where the paper reports
23.4 GB at batch 300, so the paper's run must have held much more than these tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.bases import SHAPES, Shape, build_base, share_weights
from common.memory import MIB, NewStorages, saved_bytes
from dora_peft import DoraConfig, param_groups
from reproduction.common import Options, Runs
from reproduction.memory_figure import METHODS, PAPER, TITLES, draw
from reproduction.reference_linear import MatmulInFp32, ReferenceLinear
from vl_bart.model import SIZES, VlBartConfig, build_vl_bart, random_batch

DTYPE = torch.bfloat16
# tokens that VL-BART's decoder learns
ANSWER_LEN = 5
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
    # batch and length; the first one is the paper's
    settings: list[tuple[int, int]]
    # what `build` and `batch` depend on
    shape: Mapping[str, Any] = field(default_factory=dict)

    def methods(self) -> list[str]:
        """What is measured; without dropout it does not matter where it acts."""
        return [method for method in METHODS if self.dropout or method != "dora_branch"]

    def facts(self) -> dict[str, Any]:
        """All that a measured figure depends on, beside batch, length and method."""
        names = ("shape", "targets", "rank", "alpha", "dropout")
        return {name: getattr(self, name) for name in names}


def families(options: Options) -> dict[str, Family]:
    """The two models at the size asked for."""
    size = "toy" if options.dry_run else options.size
    # ranks shrink with the widths
    llama, shrink = LLAMA[size], 1 if size == "full" else 8

    def build_llama(device: torch.device) -> nn.Module:
        return build_base(llama, llama.layers, llama.vocab, DTYPE, device, 0)

    def llama_batch(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
        ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}  # type: ignore[dict-item]

    def build_bart(device: torch.device) -> nn.Module:
        model: nn.Module = build_vl_bart(size)
        return model.to(device, DTYPE).requires_grad_(False)

    def bart_batch(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
        found = random_batch(model.config, batch, length, ANSWER_LEN, device)
        return {name: t.to(DTYPE) if t.is_floating_point() else t for name, t in found.items()}

    return {
        "llama": Family(
            build_llama, llama_batch, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            32 // shrink, 64 / shrink, 0.05, LLAMA_SETTINGS[size], dataclasses.asdict(llama),
        ),
        "vl_bart": Family(
            build_bart, bart_batch, ["q_proj", "v_proj"], 128 // shrink, 128 / shrink, 0.0, BART_SETTINGS[size],
            SIZES[size] | {"visual_tokens": VlBartConfig.visual_tokens, "answer_len": ANSWER_LEN},
        ),
    }  # fmt: skip


def adapted_linears(model: nn.Module, targets: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            yield name, module


def predict_saving(family: Family) -> float:
    """MiB that detaching saves, from the shapes alone: one dense W0 + s B A per adapted module, in the base's dtype."""
    with torch.device("meta"):
        base = family.build(torch.device("meta"))
    return sum(linear.weight.nbytes for _, linear in adapted_linears(base, family.targets)) / MIB


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
            mode: Any = "branch" if method == "dora_branch" else "paper"
            config = DoraConfig(**common, detach_norm=method != "dora_not_detached", dropout_mode=mode)
        else:
            config = LoraConfig(**common, use_dora=method == "peft_dora")
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model.train()


def measure(
    method: str, base: nn.Module, family: Family, batch: int, length: int, device: torch.device
) -> dict[str, Any]:
    """Bytes of a training step with AdamW.

    Returns:
        `total_mib`, on a GPU the allocator's peak, on the CPU the sum of the others: `weights_mib` (parameters,
        buffers, and what a first pass caches for good), `gradients_mib`, `optimizer_mib`, and `saved_mib`, what is kept
        from forward to backward.
    """
    on_cpu = device.type == "cpu"
    if not on_cpu:
        # the previous model, whose modules refer to each other
        gc.collect()
    # the collections below look at nothing older than this
    gc.freeze()
    torch.manual_seed(0)
    inputs = family.batch(base, batch, length, device)

    def forward() -> Tensor:
        return model(**inputs).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        with MatmulInFp32() if on_cpu else contextlib.nullcontext():
            with NewStorages() as added:
                model = attach(method, base, family)
                forward()
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = sum(p.nbytes for p in trained)
            weights = sum(t.nbytes for t in [*base.parameters(), *base.buffers()]) + added.alive_bytes()
            found = {
                "weights_mib": weights / MIB,
                "gradients_mib": gradients / MIB,
                "optimizer_mib": 2 * gradients / MIB,
                "trained": sum(p.numel() for p in trained),
            }
            if on_cpu:
                found["saved_mib"] = saved_bytes(forward) / MIB
                parts = ("weights", "gradients", "optimizer", "saved")
                return found | {"total_mib": sum(found[f"{part}_mib"] for part in parts)}
            optimizer = torch.optim.AdamW(param_groups(model, 0.0), lr=1e-4)
            # makes the optimizer's moments, and tunes
            step()
            before = torch.cuda.memory_allocated()
            loss = forward()
            found["saved_mib"] = (torch.cuda.memory_allocated() - before) / MIB
            del loss
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            return found | {"total_mib": torch.cuda.max_memory_allocated() / MIB}
    finally:
        gc.unfreeze()
        for parameter in base.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)


def measure_if_it_fits(method: str, base: Callable[[], nn.Module], *case: Any) -> dict[str, Any]:
    """As `measure`, or `{"out_of_memory": True}`."""
    try:
        return measure(method, base(), *case)
    except torch.OutOfMemoryError:
        # the exception holds the model until this block ends
        pass
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"out_of_memory": True}


def measure_all(
    runs: Runs, name: str, family: Family, settings: Sequence[tuple[int, int]], device: torch.device, total: int
) -> None:
    """Every method at these batches and lengths."""
    # not at all if the file has everything
    base = functools.cache(lambda: family.build(device))
    for batch, length in settings:
        for method in family.methods():
            case = functools.partial(measure_if_it_fits, method, base, family, batch, length, device)
            runs.do(f"{name} {batch} x {length} {method}", case, total)


def run(options: Options) -> None:
    """Measure every method at the paper's setting and around it, store the figures, and draw them."""
    device, cases = options.device, families(options)
    settings = {
        "measured": "the allocator's peak" if device.type == "cuda" else "sum of exact bytes",
        "device": device.type,
        "dtype": str(DTYPE).removeprefix("torch."),
        "models": {name: family.facts() for name, family in cases.items()},
    }
    runs = Runs("memory", options, settings)
    for key in [key for key, found in runs.runs.items() if "out_of_memory" in found]:
        # this GPU may be larger
        del runs.runs[key]
    total = sum(len(family.methods()) * len(family.settings) for family in cases.values())
    for sweep in (False, True):
        # the paper's settings first
        for name, family in cases.items():
            measure_all(runs, name, family, family.settings[1:] if sweep else family.settings[:1], device, total)
    whole = cases if options.size == "full" else families(dataclasses.replace(options, size="full", dry_run=False))
    summary = {}
    for name, family in cases.items():
        summary[name] = summarise(runs.runs, name, family, predict_saving(family))
        summary[name]["saved_gb"] = {
            "at_full_size": predict_saving(whole[name]) * MIB / 1e9,
            "paper": PAPER[name]["reference_not_detached"] - PAPER[name]["reference"],
        }
    runs.finish(summary)
    path = runs.path.with_suffix(".png")
    draw(summary, runs.content, path)
    for name, found in summary.items():
        print(f"{TITLES[name]}, batch x length {found['setting']}: {conclude(found)}")
    print(f"wrote {path}")


def conclude(found: Mapping[str, Any]) -> str:
    """The result of one model in a line."""
    if "reference" not in found["saving_percent"]:
        return "the dense algorithm did not fit into memory"
    measured, predicted = (f"{found['saved_mib'][name]:.2f} MiB" for name in ("measured", "predicted"))
    text = (
        f"detaching saves {measured} (predicted {predicted}) or {found['saving_percent']['reference']:.1f} % on the "
        f"dense algorithm (paper {found['paper_percent']:.1f} %)"
    )
    # it may not have fitted
    if "dora" in found["saving_percent"]:
        text += f", {found['saving_percent']['dora']:.1f} % on ours"
    return f"{text}; ours takes {found['ours_to_lora']:.2f} of LoRA's memory" if "ours_to_lora" in found else text


def summarise(runs: Mapping[str, Any], name: str, family: Family, predicted_mib: float) -> dict[str, Any]:
    """Totals of each method at each setting, and what detaching saves there; cases that did not fit are left out.

    Args:
        predicted_mib: What detaching saves on the dense algorithm, from shapes.

    Returns:
        `saved_mib`: measured and predicted, at the paper's setting. `predicted_percent_by_setting`: the predicted MiB
        in per cent of the measured total, which is not predicted. `ours_to_lora` is that of our default dropout,
        `ours_paper_dropout_to_lora` that of the paper's.
    """
    table: dict[str, dict[str, float]] = {}
    for batch, length in family.settings:
        found = {method: runs[f"{name} {batch} x {length} {method}"] for method in family.methods()}
        table[f"{batch} x {length}"] = {m: run["total_mib"] for m, run in found.items() if "total_mib" in run}
    setting, first = next(iter(table.items()))
    dense = ("reference", "reference_not_detached")
    fitting = {key: values for key, values in table.items() if all(method in values for method in dense)}
    predicted = {key: 100 * predicted_mib / values[dense[1]] for key, values in fitting.items()}
    summary: dict[str, Any] = {
        "total_mib": table,
        "setting": setting,
        "saving_percent": {
            method: saving(first, method) for method in ("reference", "dora") if f"{method}_not_detached" in first
        },
        "saving_percent_by_setting": {key: saving(values, "reference") for key, values in fitting.items()},
        "predicted_percent_by_setting": predicted,
        "paper_percent": saving(PAPER[name], "reference"),
        "saved_mib": {"predicted": predicted_mib},
    }
    if setting in fitting:
        summary["saved_mib"]["measured"] = first[dense[1]] - first[dense[0]]
    if "lora" in first:
        ours = {
            "ours_to_lora": first.get("dora_branch", first.get("dora")),
            "ours_paper_dropout_to_lora": first.get("dora"),
        }
        summary |= {key: value / first["lora"] for key, value in ours.items() if value is not None}
    return summary


def saving(totals: Mapping[str, float], method: str) -> float:
    """What detaching saves, in per cent."""
    return 100 * (1 - totals[method] / totals[f"{method}_not_detached"])
