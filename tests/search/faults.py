"""Faults that are sown into the package, one at a time, for the search to find.

Each replaces one function or method, at every place that has its name. `HOOKS` says where.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

LAYERS = "dora_peft.layers"
HOOKS = {
    "scale": [
        "dora_peft.ops.norm:scale",
        f"{LAYERS}.scale:scale",
        f"{LAYERS}.shortcut:scale",
        "dora_peft.norms.evaluation:scale",
    ],
    "layer_scale": [f"{LAYERS}.{user}:scale_of" for user in ("scale", "layer", "linear", "forward")],
    "active": [f"{LAYERS}.layer:DoraLayer.active_adapters"],
    "bias": [f"{LAYERS}.{user}:bias_of" for user in ("linear", "forward")],
    "set_scale": [f"{LAYERS}.layer:DoraLayer.set_scale"],
    "unmerge": [f"{LAYERS}.layer:DoraLayer.unmerge"],
    "magnitude_gradient": [
        f"dora_peft.ops.{user}:magnitude_gradient" for user in ("linear_autograd", "linear_by_kernels")
    ],
    "linear_eval": [f"{LAYERS}.{user}:linear_eval" for user in ("linear", "shortcut")],
    "version": ["dora_peft.ops.kept_output:same_bits"],
    "content": ["dora_peft.ops.content:Bits.fits"],
    "merged_rows": ["dora_peft.ops.merging:merged_rows"],
    "combine": ["dora_peft.ops.merging:weighted_sum"],
    "conv_branch": [f"{LAYERS}.conv:conv_branch"],
    "to_checkpoint": ["dora_peft.adapters.checkpoint:_readable_by_peft"],
}

# the original function to the faulty one
Fault = Callable[[Any], Any]


def locate(hook: str) -> list[tuple[Any, str]]:
    """The objects that hold the function, and its name there."""
    found = []
    for place in HOOKS[hook]:
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, name)
        found.append((owner, name))
    return found


def negated_magnitude_gradient(original: Any) -> Any:
    return lambda *args: -original(*args)


def undivided_magnitude_gradient(original: Any) -> Any:
    """sum g (y - b), which is dc * c."""
    return lambda sums, g, y, c, *rest: original(sums, g, y, c, *rest) * c


def tied_rows_ignored(original: Any) -> Any:
    return lambda magnitude, norm, tied: original(magnitude, norm, None)


def missing_detach(original: Any) -> Any:
    """The full gradient where the detached one is asked for."""

    def scale(self: Any, adapter: str, **options: Any) -> Any:
        asked, self.detach_norm[adapter] = self.detach_norm[adapter], False
        try:
            return original(self, adapter, **options)
        finally:
            self.detach_norm[adapter] = asked

    return scale


def superfluous_detach(original: Any) -> Any:
    """The detached gradient where the full one is asked for."""
    return lambda self, adapter, differentiable=False, **options: original(self, adapter, **options)


def reversed_order(original: Any) -> Any:
    return property(lambda self: original.fget(self)[::-1])


def dropped_bias(original: Any) -> Any:
    return lambda self: None


def forgotten_scale(original: Any) -> Any:
    return lambda self, adapter, scale: None


def scaling_left_out(original: Any) -> Any:
    """Of evaluation."""
    return lambda *args, alpha=1.0, **options: original(*args, alpha=1.0, **options)


def stale_folded_B(original: Any) -> Any:
    """The first folded B of each A, whatever becomes of B and m."""
    first: dict[Any, Any] = {}

    def linear_eval(x: Any, lora_A: Any, folded_B: Any, c: Any, **options: Any) -> Any:
        kept = first.setdefault((lora_A.data_ptr(), folded_B.shape), (folded_B.clone(), lora_A))[0]
        return original(x, lora_A, kept, c, **options)

    return linear_eval


def trusted_output(original: Any) -> Any:
    """No change of the kept output is noticed."""

    def unchanged(*arguments: Any) -> Any:
        # the same content, or the same version
        return isinstance(original(*arguments), bool) or 0

    return unchanged


def skipped_content_check(original: Any) -> Any:
    """Whatever was computed once counts as up to date."""
    return lambda known, *now: known is not None


def wrong_sign_in_merge(original: Any) -> Any:
    def merged_rows(rows: Any, start: int, stop: int, adapters: Any) -> Any:
        return original(rows, start, stop, [(A, B, -s, c) for A, B, s, c in adapters])

    return merged_rows


def combined_without_scale(original: Any) -> Any:
    """A and B are summed as if c were 1."""
    return lambda adapters, weights: original([(A, B, s, torch.ones_like(c)) for A, B, s, c in adapters], weights)


def unmerged_by_subtraction(original: Any) -> Any:
    """As PEFT does, which leaves rounding behind."""

    def unmerge(self: Any) -> None:
        merged = self.get_base_layer().weight.detach().clone() if self.merged else None
        original(self)
        weight = self.get_base_layer().weight
        if merged is not None:
            delta = merged - weight
            weight.data.copy_(merged - delta)

    return unmerge


def convolution_without_scaling(original: Any) -> Any:
    return lambda x, A, B, scaling, base_layer: original(x, A, B, 1.0, base_layer)


def saved_as_it_is(original: Any) -> Any:
    """Tied rows and grouped convolutions are not written as plain PEFT reads them."""
    return lambda *args: {}


FAULTS: list[tuple[str, Fault]] = [
    ("magnitude_gradient", negated_magnitude_gradient),
    ("magnitude_gradient", undivided_magnitude_gradient),
    ("scale", tied_rows_ignored),
    ("layer_scale", missing_detach),
    ("layer_scale", superfluous_detach),
    ("active", reversed_order),
    ("bias", dropped_bias),
    ("set_scale", forgotten_scale),
    ("linear_eval", scaling_left_out),
    ("linear_eval", stale_folded_B),
    ("version", trusted_output),
    ("content", skipped_content_check),
    ("merged_rows", wrong_sign_in_merge),
    ("combine", combined_without_scale),
    ("unmerge", unmerged_by_subtraction),
    ("conv_branch", convolution_without_scaling),
    ("to_checkpoint", saved_as_it_is),
]
