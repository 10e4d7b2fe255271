"""Faults that are sown into the package, one at a time, for the search to find.

Each replaces one function or method. `HOOKS` says where these live; of several places the first that exists counts, so
that a function may move.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

HOOKS = {
    "scale": ["dora_peft.ops.functional:scale", "dora_peft.functional:scale"],
    "layer_scale": ["dora_peft.layers.layer:DoraLayer.scale", "dora_peft.layer:DoraLayer.scale"],
    "active": ["dora_peft.layers.layer:DoraLayer.active_adapters", "dora_peft.layer:DoraLayer.active_adapters"],
    "bias": ["dora_peft.layers.layer:DoraLayer._bias", "dora_peft.layer:DoraLayer._bias"],
    "set_scale": ["dora_peft.layers.layer:DoraLayer.set_scale", "dora_peft.layer:DoraLayer.set_scale"],
    "unmerge": ["dora_peft.layers.layer:DoraLayer.unmerge", "dora_peft.layer:DoraLayer.unmerge"],
    "magnitude_gradient": ["dora_peft.ops.linear:magnitude_gradient", "dora_peft.linear:magnitude_gradient"],
    "fold": ["dora_peft.ops.linear:fold", "dora_peft.linear:fold"],
    "linear_eval": ["dora_peft.ops.linear:linear_eval", "dora_peft.linear:linear_eval"],
    "version": ["dora_peft.ops.kept_output:same_bits", "dora_peft.linear:_version"],
    "content": ["dora_peft.ops.content:Bits.fits", "dora_peft.norm:_same"],
    "merged_rows": ["dora_peft.ops.merging:merged_rows", "dora_peft.merging:merged_rows"],
    "combine": ["dora_peft.ops.merging:weighted_sum", "dora_peft.merging:combine"],
    "conv_branch": ["dora_peft.ops.functional:conv_branch", "dora_peft.functional:conv_branch"],
    "to_checkpoint": ["dora_peft.adapters.checkpoint:_readable_by_peft", "dora_peft.checkpoint:_readable_by_peft"],
}

Fault = Callable[[Any], Any]  # the original function to the faulty one


def locate(hook: str) -> tuple[Any, str]:
    """The object that holds the function, and its name there."""
    for place in HOOKS[hook]:
        module, _, path = place.partition(":")
        try:
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            getattr(owner, name)
        except (ImportError, AttributeError):
            continue
        return owner, name
    raise LookupError(f"None of {', '.join(HOOKS[hook])} exists; say in HOOKS where '{hook}' is now.")


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
    return lambda self, adapter, **options: original(self, adapter)


def reversed_order(original: Any) -> Any:
    return property(lambda self: original.fget(self)[::-1])


def dropped_bias(original: Any) -> Any:
    return lambda self: None


def forgotten_scale(original: Any) -> Any:
    return lambda self, adapter, scale: None


def scaling_left_out(original: Any) -> Any:
    """Of the folded B."""
    return lambda lora_B, c, scaling: original(lora_B, c, 1.0)


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
        return isinstance(original(*arguments), bool) or 0  # the same content, or the same version

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
    ("fold", scaling_left_out),
    ("linear_eval", stale_folded_B),
    ("version", trusted_output),
    ("content", skipped_content_check),
    ("merged_rows", wrong_sign_in_merge),
    ("combine", combined_without_scale),
    ("unmerge", unmerged_by_subtraction),
    ("conv_branch", convolution_without_scaling),
    ("to_checkpoint", saved_as_it_is),
]
