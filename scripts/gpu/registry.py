"""The names of the checks of scripts/check_gpu.py, and how one runs. Importing this file imports nothing large.

Checks that need the same compiled kernels stand in one group: a group is one worker's, so that two workers seldom
compile the same. A check is the function of its name in the module of its group; it calls `figures.add` for what it
compares and compares everything, whatever came out before.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "dora_peft"
# Of a group: the module below gpu/, and the checks in it.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": (
        "layer_checks",
        (
            "layer_bf16",
            "layer_without_bias",
            "layer_strided",
            "layer_bias_hides_output",
            "layer_output_overwritten",
            "layer_evaluation",
            "layer_large",
            "layer_past_2_31_elements",
        ),
    ),
    "bf16_fp32": (
        "layer_checks",
        ("layer_bf16_fp32_adapter", "layer_tiny_magnitude", "layer_autocast", "layer_rank_384"),
    ),
    "fp32": ("layer_checks", ("layer_fp32", "layer_one_token", "layer_conv1d")),
    "fp16": ("layer_checks", ("layer_fp16", "layer_odd_sizes")),
    "dropout": ("dropout_checks", ("dropout_layer", "dropout_share", "dropout_seeds", "dropout_recomputed")),
    "norm": (
        "norm_checks",
        (
            "norm_at_creation",
            "norm_large",
            "norm_rank_384",
            "norm_after_edit_of_factors",
            "norm_after_edit_of_base",
            "norm_that_cancels",
        ),
    ),
    "model": (
        "model_checks",
        (
            "model_like_peft",
            "model_trains_like_torch",
            "model_with_checkpointing",
            "model_merged",
            "model_with_two_adapters",
        ),
    ),
    "device": (
        "device_checks",
        (
            "auto_takes_kernels",
            "nothing_waits",
            "graph_replays",
            "compiled",
            "two_devices",
            "poisoned_memory",
            "repeated_and_on_a_stream",
        ),
    ),
    "four_bit": ("four_bit_checks", ("four_bit_layer",)),
}
NAMES = tuple(name for _, names in GROUPS.values() for name in names)


class Skipped(Exception):
    """A check that this machine cannot run, with the reason."""


class Figures:
    """What a check found: by a label, an error and how large it may be."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, label: str, error: float, allowed: float) -> None:
        """Remember a figure; of several with one label the worst."""
        before = self.found.get(label)
        # NaN is the worst, and nothing is larger than it
        if before is None or math.isnan(error) or error > before[0]:
            self.found[label] = (error, allowed)

    def require(self, label: str, holds: bool) -> None:
        """Something that is either so or not."""
        self.add(label, 0.0 if holds else math.inf, 0.0)

    def wrong(self) -> list[str]:
        """The labels of what is off, NaN included."""
        return [label for label, (error, allowed) in self.found.items() if not error <= allowed]


def group_of(name: str) -> str:
    return next(group for group, (_, names) in GROUPS.items() if name in names)


def run_check(name: str, device: Any, implementation: str) -> dict[str, Any]:
    """One check's result: status (passed, failed, skipped), seconds, figures, reason, other packages' warnings.

    The package's own check of its kernels, where one that is wrong forbids all, is the check `auto_takes_kernels`: it
    does not keep the others from running theirs, so that one visit to a GPU tells of every fault.
    """
    import dora_peft
    from dora_peft.ops import selfcheck

    figures, start = Figures(), time.perf_counter()
    result: dict[str, Any] = {"name": name, "status": "passed", "reason": ""}
    with collected_warnings() as (ours, others):
        try:
            function = getattr(importlib.import_module(f"gpu.{GROUPS[group_of(name)][0]}"), name)
            with selfcheck.trusting(), dora_peft.implementation(implementation):
                function(device, figures)
        except Skipped as skipped:
            result |= {"status": "skipped", "reason": str(skipped)}
        # whatever it is, the other checks go on, and the report has its text
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error).strip()[:500]} ({Path(place.filename).name}:{place.lineno})"
            result |= {"status": "failed", "reason": reason}
    if result["status"] == "passed" and (wrong := figures.wrong() or not figures.found):
        reason = f"off: {', '.join(wrong)}" if isinstance(wrong, list) else "it compared nothing"
        result |= {"status": "failed", "reason": reason}
    expected = getattr(locals().get("function"), "expected_warning", None)
    unexpected = [text for text in ours if expected is None or expected not in text]
    if result["status"] == "passed" and unexpected:
        result |= {"status": "failed", "reason": f"dora_peft warned: {unexpected[0]}"}
    result["seconds"] = round(time.perf_counter() - start, 2)
    result["figures"] = {label: list(pair) for label, pair in figures.found.items()}
    return result | {"warnings_of_others": sorted(set(others))}


@contextlib.contextmanager
def collected_warnings() -> Iterator[tuple[list[str], list[str]]]:
    """The texts of the warnings of this package, and those of all others, instead of raising or showing them."""
    ours: list[str] = []
    others: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield ours, others
    for warning in caught:
        mine = PACKAGE in Path(warning.filename).resolve().parents or "dora_peft" in str(warning.message)
        (ours if mine else others).append(str(warning.message)[:300])


def format_result(result: dict[str, Any]) -> str:
    """One line: status, name, the figure that is nearest to what it may be, seconds, reason."""

    def share(pair: list[float]) -> float:
        error, allowed = pair
        return math.inf if not error <= allowed else error / allowed if allowed else 0.0

    line = f"{result['status']:>7}  {result['name']:<26}"
    if result["figures"]:
        label, (error, allowed) = max(result["figures"].items(), key=lambda item: share(item[1]))
        line += f" {len(result['figures']):>2} figures, worst {label} {error:.1e} of {allowed:.1e}"
    return f"{line}  {result['seconds']:.1f} s" + (f"  {result['reason']}" if result["reason"] else "")
