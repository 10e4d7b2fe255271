"""What it costs to ask at every forward pass whether the cached norm still belongs to the adapter's content.

    python scripts/benchmark_check.py                          # about a minute on 2 cores
    python scripts/benchmark_check.py --model tiny --rounds 2  # seconds; shows that it runs, says nothing

The check compares A, B and m with copies, and W0 with a sample of it. Its price is the time of the check alone over all
DoRA layers, as a share of what it is part of:

    training, llama-512   4 layers, 4 x 256 tokens, r=16                          goal: at most 1 % of a step
    training, llama-384   width 384, intermediate 1,024, 4 layers, 4 x 8, r=8     goal: at most 4 % of a step
    decoding, llama-512   4 layers, one token behind a prompt of 64, r=16         goal: at most 5 % of a token

In each round one training step warms the caches, a second is timed with the refresh that it brings, and then, between
steps, the check 20 times, when nothing has changed: `norms.up_to_date` of every layer, which compares and returns what
it has. In decoding 16 tokens are timed one by one, then what evaluation asks of every layer before a token. Before
anything is timed, every layer's check has to see one changed element that no version counter shows.

Expected result: a table of medians and [quartiles], and scripts/benchmarks/results/check_cpu.json with device, versions
and commit. `python scripts/update_readme.py` writes the README's table from it. Run it on an idle machine: if other
programs take cores, the steps, which use them all, slow down more than the check, and its share looks too small.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dora_peft
from benchmarks.bases import SHAPES, Shape, build_base
from benchmarks.contenders import build_contender
from benchmarks.report import RESULTS
from common.arguments import positive
from common.files import write_json
from common.machine import describe_machine
from dora_peft import norms, reference
from dora_peft.layers.shortcut import key_of

CPU = torch.device("cpu")
ADAPTER = "default"
LEARNING_RATE = 1e-4
PROMPT, NEW_TOKENS = 64, 16
# seconds of the steps or tokens of a round, and of its checks
Rounds = list[tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Setting:
    """What is run, and how many per cent of it the check may take; batch and seq_len are a training step's."""

    part: str
    model: str
    shape: Shape
    rank: int
    goal_percent: float
    batch: int = 1
    seq_len: int = 1


SETTINGS = (
    Setting("training step", "llama-512", SHAPES["llama-512"], 16, 1.0, batch=4, seq_len=256),
    Setting("training step", "llama-384", Shape(384, 1024, 6, 6, 4, 2048), 8, 4.0, batch=4, seq_len=8),
    Setting("decoding", "llama-512", SHAPES["llama-512"], 16, 5.0),
)


def build(setting: Setting, seed: int) -> tuple[Any, list[Any]]:
    """A model with a DoRA adapter in the middle of training, and its DoRA layers."""
    base = build_base(setting.shape, setting.shape.layers, setting.shape.vocab, torch.float32, CPU, seed)
    contender = build_contender(
        "dora", base, rank=setting.rank, dropout=0.0, adapter_dtype=torch.float32, seed=seed, targets="all-linear"
    )
    return contender.module, [m for m in contender.module.modules() if isinstance(m, dora_peft.DoraLayer)]


@contextlib.contextmanager
def one_element_changed(tensor: Tensor) -> Iterator[None]:
    """Another first element, written through `.data`: no version counter moves."""
    flat = tensor.data.view(-1)
    before = flat[0].clone()
    flat[0] += 1
    try:
        yield
    finally:
        flat[0] = before


def verify_training(layers: Sequence[Any]) -> None:
    """Make sure that the check finds what changed, and nothing else, and that v is right.

    Raises:
        RuntimeError: naming the module.
    """
    for layer in layers:
        known = norms.up_to_date(layer, ADAPTER)
        if norms.up_to_date(layer, ADAPTER) is not known:
            raise RuntimeError(f"{layer.name}: expected the norm to be kept if nothing changed, found it refreshed.")
        lora_A, lora_B = layer.factor_parameters(ADAPTER)
        for factor in (lora_A, lora_B):
            with one_element_changed(factor):
                found = norms.up_to_date(layer, ADAPTER)
            if found is known:
                raise RuntimeError(f"{layer.name}: expected a refresh after an edit of A or B, found the norm kept.")
        found = norms.up_to_date(layer, ADAPTER).value
        expected = reference.weight_norm(layer.get_base_layer().weight, lora_A, lora_B, layer.scaling[ADAPTER])
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < 1e-5:
            raise RuntimeError(f"{layer.name}: its norm differs from the reference's by {error:.1e} (relative).")


def shortcut_is_open(layer: Any) -> bool:
    """All that evaluation's shortcut asks before it multiplies."""
    shortcut, x = layer._shortcut, torch.empty(1, 1, layer.in_features)
    found = key_of(layer, layer, x, ADAPTER)
    if found is None or found[0] != shortcut.key:
        return False
    _, lora_A, lora_B, magnitude = found
    known = norms.fresh(layer, ADAPTER, lora_A, lora_B, layer.scaling[ADAPTER], shortcut.stored, shortcut.by_kernels)
    return shortcut.folded.known is known and shortcut.folded.magnitude.fits(magnitude)


def verify_decoding(layers: Sequence[Any]) -> None:
    """Make sure that every layer takes evaluation's short road, and leaves it after an edit of A, B or m.

    Raises:
        RuntimeError: naming the module.
    """
    for layer in layers:
        if layer._shortcut is None or not shortcut_is_open(layer):
            raise RuntimeError(f"{layer.name}: expected evaluation's shortcut to be open after a token, found it shut.")
        for parameter in (*layer.factor_parameters(ADAPTER), layer.magnitude(ADAPTER)):
            with one_element_changed(parameter):
                still_open = shortcut_is_open(layer)
            if still_open:
                raise RuntimeError(f"{layer.name}: expected an edit of A, B or m to shut the shortcut, found it open.")


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds_of(label: str, options: argparse.Namespace) -> Iterator[int]:
    """The numbers of the rounds, from -1, which warms up. The garbage collector runs between rounds only."""
    gc.collect()
    # collections look at nothing older than this
    gc.freeze()
    gc.disable()
    try:
        for number in tqdm(range(-1, options.rounds), desc=label, unit="round", disable=None):
            gc.collect()
            yield number
    finally:
        gc.enable()
        gc.unfreeze()


def measure_training(setting: Setting, options: argparse.Namespace) -> tuple[int, Rounds]:
    """The number of DoRA layers, and seconds of training steps and of the checks between them."""
    model, layers = build(setting, options.seed)
    verify_training(layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    ids = torch.randint(setting.shape.vocab, (setting.batch, setting.seq_len))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    def check() -> None:
        for layer in layers:
            norms.up_to_date(layer, ADAPTER)

    rounds = []
    for number in rounds_of(f"{setting.part}, {setting.model}", options):
        # the checks below have brought the norm up to date, so that this step would not refresh it
        step()
        steps = [seconds(step)]
        # the optimizer has changed A and B: this one refreshes
        check()
        checks = [seconds(check) for _ in range(options.checks)]
        if number >= 0:
            rounds.append((steps, checks))
    return len(layers), rounds


@torch.no_grad()
def measure_decoding(setting: Setting, options: argparse.Namespace) -> tuple[int, Rounds]:
    """The number of DoRA layers, and seconds of single tokens and of the checks after them."""
    model, layers = build(setting, options.seed)
    model.eval()
    prompt = torch.randint(setting.shape.vocab, (setting.batch, PROMPT))
    token = prompt[:, :1]
    verified = False

    def check() -> None:
        for layer in layers:
            shortcut_is_open(layer)

    rounds = []
    for number in rounds_of(f"{setting.part}, {setting.model}", options):
        cache = model(input_ids=prompt, use_cache=True).past_key_values

        def decode(cache: Any = cache) -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True)

        tokens = [seconds(decode) for _ in range(NEW_TOKENS)]
        if not verified:
            verify_decoding(layers)
            verified = True
        checks = [seconds(check) for _ in range(options.checks)]
        if number >= 0:
            rounds.append((tokens, checks))
    return len(layers), rounds


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of a single value three times that value."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median, "q1": q1, "q3": q3}


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: medians over all rounds, and the quartiles of the shares within the rounds."""
    torch.manual_seed(options.seed)
    layers, rounds = (measure_decoding if setting.part == "decoding" else measure_training)(setting, options)
    steps, checks = ([1000 * value for part in parts for value in part] for parts in zip(*rounds, strict=True))
    step_ms, check_ms = summarize(steps), summarize(checks)
    shares = summarize([100 * statistics.median(check) / statistics.median(step) for step, check in rounds])
    sizes = (
        {"prompt": PROMPT, "new_tokens": NEW_TOKENS}
        if setting.part == "decoding"
        else {"batch": setting.batch, "seq_len": setting.seq_len}
    )
    return {
        "part": setting.part,
        "model": setting.model,
        "layers": setting.shape.layers,
        "setting": {"rank": setting.rank, "dtype": "fp32", **sizes},
        "adapted_layers": layers,
        "steps": len(steps),
        "checks": len(checks),
        "step_ms": step_ms,
        "check_ms": check_ms,
        "us_per_layer": 1000 * check_ms["median"] / layers,
        "percent": 100 * check_ms["median"] / step_ms["median"],
        "percent_q1": shares["q1"],
        "percent_q3": shares["q3"],
        # of other shapes nobody asked for a goal
        "goal_percent": setting.goal_percent if options.model is None else None,
    }


def format_table(results: Sequence[dict[str, Any]]) -> str:
    rows = [["", "step or token, ms", "check, ms", "us a layer", "per cent", "", "goal"]]
    for found in results:
        goal = "-"
        if found["goal_percent"] is not None:
            goal = (
                f"at most {found['goal_percent']:g}: {'met' if found['percent'] <= found['goal_percent'] else 'missed'}"
            )
        sizes = found["setting"]
        size = f"{sizes['batch']} x {sizes['seq_len']} tokens" if "batch" in sizes else "one token"
        rows.append(
            [
                f"{found['part']}, {found['model']}, {size}, r={sizes['rank']}",
                f"{found['step_ms']['median']:.2f} [{found['step_ms']['q1']:.2f}, {found['step_ms']['q3']:.2f}]",
                f"{found['check_ms']['median']:.3f} [{found['check_ms']['q1']:.3f}, {found['check_ms']['q3']:.3f}]",
                f"{found['us_per_layer']:.1f}",
                f"{found['percent']:.2f}",
                f"[{found['percent_q1']:.2f}, {found['percent_q3']:.2f}]",
                goal,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, help="in place of each setting's own, without a goal")
    parser.add_argument("--rounds", type=positive, default=10, help="timed rounds after one of warm-up (10)")
    parser.add_argument("--checks", type=positive, default=20, help="timed checks in a round (20)")
    parser.add_argument("--threads", type=positive, help="of torch (torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = options.json or options.results / ("_".join(filter(None, ["check", options.model, "cpu"])) + ".json")
    settings = SETTINGS
    if options.model is not None:
        shape = SHAPES[options.model]
        settings = tuple(
            Setting(s.part, options.model, shape, s.rank, s.goal_percent, s.batch, s.seq_len) for s in SETTINGS
        )
    machine = describe_machine(CPU)
    results = [measure(setting, options) for setting in settings]
    write_json(path, {**machine, "rounds": options.rounds, "seed": options.seed, "check": results})
    print(format_table(results))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    state = f"{machine['commit'] or 'unknown'}{', modified' if machine['modified'] else ''}"
    print(f"\n{machine['device']} ({machine['processor']}), threads {machine['threads']}; {versions}; commit {state}")
    print(f"medians of {options.rounds} rounds with {options.checks} checks each; wrote {path}")


if __name__ == "__main__":
    main()
