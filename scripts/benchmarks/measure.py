"""How `scripts/benchmark.py` measures: interleaved rounds, quartiles, equal results first, one training step.

A result is a dictionary with `setting`, `quantity` ("time_ms", "saved_mib", "peak_mib", ...), `reference` (the
contender that ratios are relative to), `contenders` (values, quartiles, ratios; see `summarize`) and `checked` (how
far equal contenders differed). `skipped` collects the contenders that could not run, with the reason.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.bases import DTYPES, SHAPES, build_base
from benchmarks.contenders import Contender, Results, build_contender, check_equal, unavailable, without_dropout

Skipped = dict[str, str]
Result = dict[str, Any]
LEARNING_RATE = 1e-4


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value three times that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def summarize(
    quantity: str,
    setting: Mapping[str, Any],
    values: Mapping[str, Sequence[float]],
    checked: Mapping[str, Any] | None = None,
    reference: str = "lora",
) -> Result:
    """One result: the values of each contender, their quartiles, and the quartiles of their ratios to the reference.

    A ratio is taken within each round, between neighbours in time, so that a machine that slows down cancels out.
    """
    contenders = {}
    for name, found in values.items():
        q1, median, q3 = quartiles(found)
        contenders[name] = {"values": list(found), "median": median, "q1": q1, "q3": q3}
        units = values.get(reference)
        if units is not None and all(units):
            ratio_q1, ratio, ratio_q3 = quartiles([a / b for a, b in zip(found, units, strict=True)])
            contenders[name] |= {"ratio": ratio, "ratio_q1": ratio_q1, "ratio_q3": ratio_q3}
    return {
        "quantity": quantity,
        "setting": dict(setting),
        "reference": reference,
        "contenders": contenders,
        "checked": dict(checked or {}),
    }


def clock(device: torch.device) -> float:
    """Seconds, after everything that was started on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(
    calls: Mapping[str, Callable[[], Mapping[str, float]]], options: Namespace, label: str
) -> dict[str, dict[str, list[float]]]:
    """Run all contenders once per round, in an order shuffled for each round; the first rounds warm up.

    Returns:
        For each part that the calls report, such as "forward", the milliseconds of each contender, round by round.
    """
    order, shuffle = list(calls), random.Random(options.seed).shuffle
    times: dict[str, dict[str, list[float]]] = {}
    gc.collect()
    # collections look at nothing older than this: 0.2 s each otherwise
    gc.freeze()
    # and one in the middle of a run would hit whoever runs at that moment
    gc.disable()
    try:
        for index in tqdm(range(options.warmup + options.rounds), desc=label, unit="round", disable=None):
            shuffle(order)
            for name in order:
                gc.collect()
                parts = calls[name]()
                if index >= options.warmup:
                    for part, seconds in parts.items():
                        times.setdefault(part, {key: [] for key in calls})[name].append(seconds * 1000)
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def build_model(options: Namespace, dtype: str) -> Any:
    return build_base(SHAPES[options.model], options.layers, options.vocab, DTYPES[dtype], options.device, options.seed)


def build_contenders(
    base: nn.Module, options: Namespace, skipped: Skipped, rank: int, dropout: float, adapter_dtype: str, **rest: Any
) -> dict[str, Contender]:
    """Those of the wanted contenders that this machine can run."""
    contenders = {}
    for name in options.contenders:
        if name not in skipped:
            reason = unavailable(name, options.device)
            if reason is not None:
                skip(skipped, name, reason)
                continue
            contenders[name] = build_contender(
                name, base, rank=rank, dropout=dropout, adapter_dtype=DTYPES[adapter_dtype], seed=options.seed, **rest
            )
    return contenders


def skip(skipped: Skipped, name: str, reason: str) -> None:
    skipped[name] = reason.strip().splitlines()[0][:300]
    print(f"note: {name} left out: {skipped[name]}", flush=True)


def check_contenders(
    contenders: dict[str, Contender], observe: Callable[[Contender], Results], dtype: str, skipped: Skipped
) -> dict[str, dict[str, Any]]:
    """Compare what `observe` sees of each contender, without dropout.

    A model that does not compile is left out, and so is one of another package that does not fit into a GPU's memory.

    Raises:
        RuntimeError: naming contender and tensor, if contenders that should be equal are not.
    """
    results: dict[str, Results] = {}
    for name, contender in list(contenders.items()):
        try:
            with without_dropout(contender.module), contender.context():
                results[name] = observe(contender)
        except Exception as error:
            too_large = isinstance(error, torch.OutOfMemoryError) and name not in ("lora", "dora")
            if not name.endswith("_compiled") and not too_large:
                raise
            contender.module.zero_grad()
            skip(skipped, name, f"{type(error).__name__}: {error}")
            del contenders[name]
    if "frozen" in contenders:
        lora = contenders["lora"]
        with without_dropout(lora.module), lora.module.disable_adapter():
            results["base"] = {key: tensor for key, tensor in observe(lora).items() if "lora_" not in key}
    return check_equal(results, dtype)


def prepare_training(contender: Contender, checkpointing: str) -> torch.optim.Optimizer | None:
    """Turn on checkpointing and make the optimizer; without an adapter there is none.

    The frozen model's embeddings require a gradient, so that it computes dx through all layers. With checkpointing all
    contenders' do, as PEFT arranges it.
    """
    module = contender.module
    if checkpointing != "none":
        enable_checkpointing(module, use_reentrant=checkpointing == "reentrant")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if checkpointing != "none" or not trained:
        module.enable_input_require_grads()
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0) if trained else None


def compute_loss(contender: Contender, batch: Tensor) -> Tensor:
    return contender.call(input_ids=batch, labels=batch, use_cache=False).loss


def train(contender: Contender, optimizer: torch.optim.Optimizer | None, batches: Sequence[Tensor]) -> Tensor:
    """One optimizer step over all micro-batches; returns the last one's loss."""
    with contender.context():
        if optimizer is not None:
            optimizer.zero_grad()
        for batch in batches:
            loss = compute_loss(contender, batch)
            (loss / len(batches)).backward()
        if optimizer is not None:
            optimizer.step()
    return loss.detach()


def observe_gradients(contender: Contender, batch: Tensor) -> Results:
    """Loss, logits of the last token and adapter gradients of one batch."""
    contender.module.zero_grad()
    output = contender.call(input_ids=batch, labels=batch, use_cache=False)
    if output.loss.requires_grad:
        output.loss.backward()
    results = {"loss": output.loss.detach(), "logits": output.logits[:, -1].detach().clone(), **contender.gradients()}
    contender.module.zero_grad()
    return results


def random_tokens(options: Namespace, count: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(options.vocab, (count, options.batch, length), generator=generator)
    return list(ids.to(options.device))


def enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    """Turn on activation checkpointing, which transformers renamed in the course of version 5."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
