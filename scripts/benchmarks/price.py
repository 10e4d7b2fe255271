"""The settings of scripts/benchmark_price.py, and what one process measures of one of them.

A setting is measured under every library of benchmarks/libraries.py in the same rounds. Each library has its own models
around the same base weights, made and checked while it multiplies: a layer decides once how it is computed.
"""

from __future__ import annotations

import argparse
import random
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.bases import DTYPES, SHAPES, Shape, build_base
from benchmarks.contenders import Contender, Results, build_contender, check_equal, unavailable
from benchmarks.libraries import LIBRARIES, library
from benchmarks.measure import (
    check_contenders,
    clock,
    interleave,
    observe_gradients,
    prepare_training,
    random_tokens,
    train,
)

CPU = torch.device("cpu")
# Of the shapes that are drawn: the figures are of shapes that nobody has chosen.
SEED, DRAWN = 17, 10
VOCABULARY = 2048
# Ours over its unit, by the names that tables have.
PRICES = {"ours / LoRA": ("dora", "lora")}
COMPILED = {
    "compiled ours / compiled LoRA": ("dora_compiled", "lora_compiled"),
    "compiled / eager ours": ("dora_compiled", "dora"),
}


@dataclass(frozen=True)
class Setting:
    """What is trained for a step: a model of true widths in fp32 with adapters at all linear layers.

    Attributes:
        layers: Decoder layers.
        batch, seq_len: Sequences and tokens in each.
        compiled: Whether compiled contenders are compared as well; they are not compiled with another F.linear.
    """

    shape: Shape
    layers: int
    batch: int
    seq_len: int
    rank: int
    dropout: float = 0.0
    compiled: bool = False

    @property
    def prices(self) -> dict[str, tuple[str, str]]:
        """The ratios that are wanted: of which contender to which."""
        return COMPILED if self.compiled else PRICES

    @property
    def libraries(self) -> tuple[str, ...]:
        return tuple(name for name in LIBRARIES if not (self.compiled and name == "same"))

    def contenders(self) -> list[str]:
        """What is timed."""
        return ["lora", "dora", *(["lora_compiled", "dora_compiled"] if self.compiled else [])]

    def describe(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def draw_settings(seed: int, count: int) -> list[Setting]:
    """Settings of 128 to 600 tokens, widths of 400 to 1,600, ranks of 8 to 64, some of them with dropout."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        head_dim = 2 * draw.randint(16, 64)
        heads = draw.randint(-(-400 // head_dim), 1600 // head_dim)
        kv_heads = draw.choice([heads // share for share in (1, 2, 3, 4) if heads % share == 0])
        hidden = heads * head_dim
        shape = Shape(hidden, round(hidden * draw.uniform(2, 3.5)), heads, kv_heads, 2, VOCABULARY, head_dim)
        batch = draw.randint(1, 4)
        seq_len = draw.randint(-(-128 // batch), 600 // batch)
        rank, dropout = draw.choice([8, 16, 32, 64]), draw.choice([0.0, 0.0, 0.05, 0.1])
        found.append(Setting(shape, 1 if hidden > 1000 else 2, batch, seq_len, rank, dropout))
    return found


# All that are measured, and the one that runs in seconds.
SETTINGS = {
    "llama-512": Setting(SHAPES["llama-512"], 4, 4, 256, 16),
    "llama-512-dropout": Setting(SHAPES["llama-512"], 4, 4, 256, 16, 0.05),
    **{f"drawn-{number}": setting for number, setting in enumerate(draw_settings(SEED, DRAWN), 1)},
    "short": Setting(SHAPES["smollm2-135m"], 3, 16, 14, 16),
    "tiny-batch": Setting(Shape(384, 1024, 6, 6, 4, VOCABULARY), 4, 4, 8, 8),
    "compiled": Setting(SHAPES["llama-512"], 2, 4, 256, 16, compiled=True),
    "toy": Setting(SHAPES["tiny"], 1, 1, 8, 2),
}
ALL = [name for name in SETTINGS if name != "toy"]


def listed(text: str) -> list[str]:
    """Settings from a command line, separated by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        raise argparse.ArgumentTypeError(f"unknown settings {','.join(unknown)}, expected some of {','.join(SETTINGS)}")
    return names


def measure_setting(name: str, rounds: int, warmup: int, seed: int) -> dict[str, Any]:
    """What one process finds: the median time of each contender in ms, and the median of each ratio, by library.

    Raises:
        RuntimeError: Contenders that should be equal are not, or one does not compile.
    """
    setting = SETTINGS[name]
    options = Namespace(
        batch=setting.batch, vocab=min(setting.shape.vocab, VOCABULARY), rounds=rounds, warmup=warmup, seed=seed,
        device=CPU,
    )  # fmt: skip
    base = build_base(setting.shape, setting.layers, options.vocab, DTYPES["fp32"], CPU, seed)
    (tokens,) = random_tokens(options, 1, setting.seq_len)
    contenders: dict[str, dict[str, Contender]] = {}
    optimizers: dict[tuple[str, str], torch.optim.Optimizer | None] = {}
    checked: dict[str, Any] = {}
    for choice in setting.libraries:
        with library(choice):
            models = build_models(setting, base, seed)
            for one in models:
                optimizers[choice, one] = prepare_training(models[one], "none")
            skipped: dict[str, str] = {}
            checked[choice] = check_contenders(models, lambda c: observe_gradients(c, tokens), "fp32", skipped)
            if skipped:
                raise RuntimeError(f"{name}: " + "; ".join(f"{one}: {why}" for one, why in skipped.items()))
            # what ours has to equal, and no more
            del models["peft_dora"]
            contenders[choice] = models
    losses: dict[str, dict[str, Results]] = {choice: {} for choice in contenders}

    def step(choice: str, one: str) -> dict[str, float]:
        with library(choice):
            start = clock(CPU)
            loss = train(contenders[choice][one], optimizers[choice, one], [tokens])
            seconds = clock(CPU) - start
        losses[choice][one] = {"last loss": loss}
        return {"step": seconds}

    calls = {
        f"{choice}/{one}": lambda choice=choice, one=one: step(choice, one)
        for choice, models in contenders.items()
        for one in models
    }
    times = interleave(calls, options, name)["step"]
    # dropout draws differently for each
    if not setting.dropout:
        for found in losses.values():
            check_equal(found, "fp32")
    return {
        choice: {
            "ms": {one: statistics.median(times[f"{choice}/{one}"]) for one in models},
            "ratio": {
                price: ratio(times[f"{choice}/{ours}"], times[f"{choice}/{unit}"])
                for price, (ours, unit) in setting.prices.items()
            },
            "checked": checked[choice],
        }
        for choice, models in contenders.items()
    }


def build_models(setting: Setting, base: Any, seed: int) -> dict[str, Contender]:
    """The contenders, and PEFT's DoRA, which ours is checked against.

    Raises:
        RuntimeError: One cannot run here.
    """
    models = {}
    for name in ["peft_dora", *setting.contenders()]:
        if reason := unavailable(name, CPU):
            raise RuntimeError(f"{name}: {reason}")
        models[name] = build_contender(
            name, base, rank=setting.rank, dropout=setting.dropout, adapter_dtype=torch.float32, seed=seed
        )
    return models


def ratio(ours: Sequence[float], unit: Sequence[float]) -> float:
    """The median of the ratios within each round: between neighbours in time, a machine that slows down cancels out."""
    return statistics.median(a / b for a, b in zip(ours, unit, strict=True))
