"""The suites of `scripts/benchmark.py` that time: step, layer, eval, decode, refresh. Each yields its results."""

from __future__ import annotations

import contextlib
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor

import dora_peft
from benchmarks.bases import DTYPES, build_layer
from benchmarks.contenders import IDLE, Contender, Results, build_contender, check_equal
from benchmarks.footprint import run_memory
from benchmarks.measure import (
    Result,
    Skipped,
    build_contenders,
    build_model,
    check_contenders,
    clock,
    interleave,
    observe_gradients,
    prepare_training,
    random_tokens,
    skip,
    summarize,
    train,
)
from benchmarks.partial import known_results
from benchmarks.resident import run_resident


def run_step(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """Whole training steps: zero_grad, forward and backward for each micro-batch, AdamW."""
    base = build_model(options, options.dtype)
    for rank, dropout, checkpointing in itertools.product(options.rank, options.dropout, options.checkpointing):
        yield time_steps(base, options, skipped, rank, dropout, checkpointing)


def time_steps(
    base: Any, options: Namespace, skipped: Skipped, rank: int, dropout: float, checkpointing: str
) -> Result:
    setting = {
        "rank": rank,
        "dropout": dropout,
        "batch": options.batch,
        "seq_len": options.seq_len,
        "accumulation": options.accumulation,
        "dtype": options.dtype,
        "adapter_dtype": options.adapter_dtype,
        "checkpointing": checkpointing,
    }
    if known := list(known_results(options, setting, "time_ms")):
        return known[0]
    batches = random_tokens(options, options.accumulation, options.seq_len)
    contenders = build_contenders(base, options, skipped, rank, dropout, options.adapter_dtype)
    optimizers = {name: prepare_training(c, checkpointing) for name, c in contenders.items()}
    checked = check_contenders(contenders, lambda c: observe_gradients(c, batches[0]), options.dtype, skipped)
    losses: dict[str, Results] = {}

    def step(name: str) -> dict[str, float]:
        start = clock(options.device)
        loss = train(contenders[name], optimizers[name], batches)
        seconds = clock(options.device) - start
        losses[name] = {"last loss": loss}
        return {"step": seconds}

    label = f"step r={rank} dropout={dropout} checkpointing={checkpointing}"
    times = interleave({name: lambda name=name: step(name) for name in contenders}, options, label)
    # AdamW takes other steps if B contains the scaling
    losses.pop("lora_floor", None)
    # the others saw the same batches, so they have to have learned the same
    if dropout == 0:
        check_equal(losses, options.dtype)
    return summarize("time_ms", setting, times["step"], checked)


def run_idle(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """Training steps with many adapters beside the active one, against those with none."""
    for result in run_step(options, skipped):
        times = {name: found["values"] for name, found in result["contenders"].items()}
        for kind in ("lora", "dora"):
            both = {name: times[name] for name in (kind, f"{kind}_idle")}
            yield summarize("time_ms", result["setting"] | {"idle": IDLE}, both, result["checked"], reference=kind)


def run_layer(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """One linear layer: forward, backward, both. Our cached norm is not refreshed here: see `run_refresh`."""
    for shape, rank, dropout in itertools.product(options.shapes, options.rank, options.dropout):
        yield from time_layer(options, skipped, shape, rank, dropout)


def time_layer(
    options: Namespace, skipped: Skipped, shape: tuple[int, int], rank: int, dropout: float
) -> Iterator[Result]:
    (inputs, outputs), dtype, device = shape, DTYPES[options.dtype], options.device
    tokens = options.batch * options.seq_len
    base = build_layer(inputs, outputs, dtype, device, options.seed)
    torch.manual_seed(options.seed)
    x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, outputs, device=device, dtype=dtype)
    contenders = build_contenders(base, options, skipped, rank, dropout, options.adapter_dtype, targets=["linear"])

    def run(contender: Contender) -> tuple[dict[str, float], Results]:
        contender.module.zero_grad()
        x.grad = None
        with contender.context():
            start = clock(device)
            y = contender.call(x)
            middle = clock(device)
            y.backward(grad)
            end = clock(device)
        parts = {"forward": middle - start, "backward": end - middle, "both": end - start}
        return parts, {"output": y.detach(), "dx": x.grad, **contender.gradients()}

    checked = check_contenders(contenders, lambda c: run(c)[1], options.dtype, skipped)
    label = f"layer {inputs}x{outputs} r={rank} dropout={dropout}"
    times = interleave({name: lambda c=c: run(c)[0] for name, c in contenders.items()}, options, label)
    for part, values in times.items():
        setting = {
            "shape": f"{inputs}x{outputs}",
            "part": part,
            "rank": rank,
            "dropout": dropout,
            "tokens": tokens,
            "dtype": options.dtype,
            "adapter_dtype": options.adapter_dtype,
        }
        yield summarize("time_ms", setting, values, checked)


def run_eval(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """Forward passes in evaluation, without gradient."""
    base = build_model(options, options.dtype)
    (batch,) = random_tokens(options, 1, options.seq_len)

    @torch.no_grad()
    def forward(contender: Contender) -> tuple[dict[str, float], Results]:
        contender.module.eval()
        with contender.context():
            start = clock(options.device)
            logits = contender.call(input_ids=batch, use_cache=False).logits
            return {"eval": clock(options.device) - start}, {"logits": logits}

    for rank in options.rank:
        setting = {
            "rank": rank,
            "batch": options.batch,
            "seq_len": options.seq_len,
            "dtype": options.dtype,
            "adapter_dtype": options.adapter_dtype,
        }
        if known := list(known_results(options, setting, "time_ms")):
            yield from known
            continue
        contenders = build_contenders(base, options, skipped, rank, 0.0, options.adapter_dtype)
        yield time_inference("eval", forward, contenders, options, skipped, setting)


def run_decode(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """Single-token forward passes behind a prompt in the KV cache: time per token, the prompt's left out."""
    base = build_model(options, options.dtype)
    (tokens,) = random_tokens(options, 1, options.seq_len + options.new_tokens)
    prompt, following = tokens[:, : options.seq_len], tokens[:, options.seq_len :].split(1, dim=1)
    for name in [name for name in options.contenders if name.endswith("_compiled")]:
        skip(skipped, name, "the cache grows with every token, and each length would be compiled again")

    @torch.no_grad()
    def decode(contender: Contender) -> tuple[dict[str, float], Results]:
        contender.module.eval()
        with contender.context():
            output = contender.call(input_ids=prompt, use_cache=True)
            start = clock(options.device)
            for token in following:
                output = contender.call(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            return {"decode": (clock(options.device) - start) / len(following)}, {"logits": output.logits}

    for rank in options.rank:
        setting = {
            "rank": rank,
            "batch": options.batch,
            "prompt": options.seq_len,
            "new_tokens": options.new_tokens,
            "dtype": options.dtype,
            "adapter_dtype": options.adapter_dtype,
        }
        if known := list(known_results(options, setting, "time_ms")):
            yield from known
            continue
        contenders = build_contenders(base, options, skipped, rank, 0.0, options.adapter_dtype)
        yield time_inference("decode", decode, contenders, options, skipped, setting)


def time_inference(
    part: str,
    run: Callable[[Contender], tuple[dict[str, float], Results]],
    contenders: dict[str, Contender],
    options: Namespace,
    skipped: Skipped,
    setting: dict[str, Any],
) -> Result:
    checked = check_contenders(contenders, lambda c: run(c)[1], options.dtype, skipped)
    calls = {name: lambda c=c: run(c)[0] for name, c in contenders.items()}
    times = interleave(calls, options, f"{part} r={setting['rank']}")
    return summarize("time_ms", setting, times[part], checked)


@contextlib.contextmanager
def counting(owner: Any, name: str) -> Iterator[list[None]]:
    """A list that grows with every call of a function that is looked up as `owner.name`, while the context lasts."""
    original, calls = getattr(owner, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def run_refresh(options: Namespace, skipped: Skipped) -> Iterator[Result]:
    """The norm alone: its error and its time per layer shape, and how often a training step computes it."""
    for shape, rank in itertools.product(options.shapes, options.rank):
        yield from measure_refresh(options, shape, rank)
    yield count_refreshes(options, skipped)


def measure_refresh(options: Namespace, shape: tuple[int, int], rank: int) -> Iterator[Result]:
    (inputs, outputs), dtype, device = shape, DTYPES[options.dtype], options.device
    base = build_layer(inputs, outputs, dtype, device, options.seed)
    adapter_dtype, targets = DTYPES[options.adapter_dtype], ["linear"]
    pefts, ours = (
        build_contender(
            name, base, rank=rank, dropout=0.0, adapter_dtype=adapter_dtype, seed=options.seed, targets=targets
        ).module
        for name in ("peft_dora", "dora")
    )
    layer, adapted = pefts.base_model.model.linear, ours.base_model.model.linear
    A, B, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]

    def peft_norm() -> Tensor:
        """What PEFT's DoRA does for its norm at every forward pass."""
        dora = layer.lora_magnitude_vector["default"]
        change = dora.get_lora_weight(lora_A=A, lora_B=B).to(dtype)
        return dora.get_weight_norm(base.linear.weight, change.detach(), scaling)

    def refresh_after_edit() -> None:
        """What an optimizer step costs: ||W0|| is known, and A or B has changed."""
        adapted.scale("default")

    def refresh_all() -> None:
        """`dora_peft.refresh`, which trusts nothing that it knows, ||W0|| included."""
        dora_peft.refresh(ours)
        adapted.scale("default")

    def timed(function: Callable[[], Any]) -> dict[str, float]:
        with torch.no_grad():
            # an edit, which the check has to notice
            adapted.lora_B["default"].weight[0].neg_()
        start = clock(device)
        function()
        return {"refresh": clock(device) - start}

    with torch.no_grad():
        exact = (base.linear.weight.double() + scaling * (B.weight.double() @ A.weight.double())).norm(dim=1)
        norms = {
            "peft_dora": peft_norm().double(),
            "dora": dora_peft.norms.up_to_date(adapted, "default").value.double(),
        }
    for function in (refresh_all, refresh_after_edit):
        before = count_norms(ours)
        with counting(dora_peft.norms.Norm, "renew") as computed:
            timed(function)
        found = len(computed) + count_norms(ours) - before
        if found != 1:
            raise RuntimeError(f"dora: expected {function.__name__} to compute one norm, found {found}.")
    setting = {
        "shape": f"{inputs}x{outputs}",
        "rank": rank,
        "dtype": options.dtype,
        "adapter_dtype": options.adapter_dtype,
    }
    errors = {name: [((norm - exact).abs() / exact).max().item()] for name, norm in norms.items()}
    yield summarize("norm_error", setting, errors, reference="peft_dora")
    for base_norm, function in (("known", refresh_after_edit), ("recomputed", refresh_all)):
        calls = {"peft_dora": lambda: timed(peft_norm), "dora": lambda function=function: timed(function)}
        times = interleave(calls, options, f"refresh {inputs}x{outputs} r={rank}")
        yield summarize("refresh_ms", setting | {"base_norm": base_norm}, times["refresh"], reference="peft_dora")


def count_norms(model: Any) -> int:
    """The norms that devices have computed for this model: the host does not know of them."""
    layers = (module for module in model.modules() if isinstance(module, dora_peft.DoraLayer))
    known = (norm.device for layer in layers for norm in layer._norms.values())
    return sum(int(device.memory.known[4]) for device in known if device is not None)


def count_refreshes(options: Namespace, skipped: Skipped) -> Result:
    """How many norms one adapted layer computes in an optimizer step with checkpointing over four micro-batches."""
    base = build_model(options, options.dtype)
    (tokens,) = random_tokens(options, 1, 4 * 16)
    # small: the count does not depend on the size
    batches = tokens[:1].split(16, dim=1)
    contenders = build_contenders(base, options, skipped, options.rank[0], 0.0, options.adapter_dtype)
    counts = {}
    for name, contender in contenders.items():
        optimizer = prepare_training(contender, "non-reentrant")
        train(contender, optimizer, batches)
        before = count_norms(contender.module)
        with (
            counting(dora_peft.norms.Norm, "renew") as ours,
            counting(DoraLinearLayer, "get_weight_norm") as pefts,
        ):
            train(contender, optimizer, batches)
        adapted = sum(hasattr(m, "base_layer") and hasattr(m, "lora_A") for m in contender.module.modules())
        by_device = count_norms(contender.module) - before
        counts[name] = [(len(ours) + by_device + len(pefts)) / max(adapted, 1)]
    setting = {
        "rank": options.rank[0],
        "accumulation": 4,
        "checkpointing": "non-reentrant",
        "dtype": options.dtype,
        "adapter_dtype": options.adapter_dtype,
    }
    return summarize("norms_per_step", setting, counts)


SUITES: dict[str, Callable[[Namespace, Skipped], Iterator[Result]]] = {
    "step": run_step,
    "layer": run_layer,
    "eval": run_eval,
    "decode": run_decode,
    "refresh": run_refresh,
    "idle": run_idle,
    "memory": run_memory,
    "resident": run_resident,
}
