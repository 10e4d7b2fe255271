"""What `doctor` finds by an adapter's magnitudes against the norms of its base, and in how the base is quantised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .doctor_files import Finding, flat_scales
from .formats import Base, Module
from .formats.source import Source
from .formats.torchtune import heads_of, interleaved

# mean |m / ||W0 + s B A|| - 1| of a module. Training moves it by less than a hundredth; a base that was quantised in
# training moves the norms of its rows by up to 2 %.
ANOTHER_BASE = 0.05
# The same where magnitudes are as they were initialised: fp32 sums differ by their order.
AS_INITIALISED = 1e-5
# Below this mean distance m is in the right order for certain.
IN_ORDER = 1e-4
COLUMNS, FROM_TORCHTUNE, TO_TORCHTUNE = "columns", "from torchtune", "to torchtune"
# What decides how far a quantised weight is from the first.
_KINDS = ("quant_method", "bits", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")


@dataclass(frozen=True)
class Norms:
    """Of one module: m, ||W0|| and ||W0 + s B A|| per output row, all [out] in fp64.

    Attributes:
        distance: mean |m / ||W0 + s B A|| - 1|.
        in_order: The same, against ||W0|| if that is less: m starts there, and need not follow B.
        orders: Distances as `in_order` is one, if m were in another order.
    """

    path: str
    module: Module
    magnitude: Tensor
    before: Tensor
    composed: Tensor
    distance: float
    in_order: float
    orders: Mapping[str, float] = field(default_factory=dict)

    @property
    def clearly(self) -> float:
        """So many times nearer are the norms in an order that fits clearly better.

        Training moves m no nearer to the norms in another order than to those in its own, but for chance: the mean over
        n rows of what moves at random has a relative deviation of about 1 / sqrt(n).
        """
        return min(2.0, 1 + 8 / math.sqrt(len(self.magnitude)))

    @property
    def fitting(self) -> str | None:
        """The other order in which m fits clearly better than in the right one."""
        best = min(self.orders, key=lambda order: self.orders[order], default=None)
        if best is None or self.in_order <= IN_ORDER or self.orders[best] * self.clearly >= self.in_order:
            return None
        return best


def norms_of(path: str, module: Module, magnitude: Tensor, base: Base) -> Norms:
    """Measure one module.

    Raises:
        UnreadableError: The base's weight cannot be read.
    """
    m = magnitude.double().cpu()
    before, composed = base.norms(path, module)
    distance = _distance(m, composed)
    in_order = min(distance, _distance(m, before))
    orders = _orders(path, module, m, (before, composed), base) if in_order > IN_ORDER else {}
    return Norms(path, module, m, before, composed, distance, in_order, orders)


def _distance(magnitude: Tensor, norms: Tensor) -> float:
    """mean |m / norm - 1|, of rows that are not zero."""
    live = norms > 0
    return (magnitude[live] / norms[live] - 1).abs().mean().item() if bool(live.any()) else 0.0


def _orders(path: str, module: Module, m: Tensor, rows: tuple[Tensor, Tensor], base: Base) -> dict[str, float]:
    orders = {}
    heads = heads_of(path, base, module.out_features)
    for name, to_torchtune in ((FROM_TORCHTUNE, False), (TO_TORCHTUNE, True)):
        if heads is not None:
            turned = interleaved(m, heads, to_torchtune=to_torchtune)
            orders[name] = min(_distance(turned, norms) for norms in rows)
    if _is_square(module):
        unchanged = replace(module, lora_B=torch.zeros_like(module.lora_B))
        orders[COLUMNS] = min(_distance(m, base.column_norms(path, one)) for one in (module, unchanged))
    return orders


def _is_square(module: Module) -> bool:
    return module.out_features == module.in_features and module.lora_A.dim() == 2 and not module.embedding


_SENTENCES = {
    "another-base": (
        "Magnitudes are far from the norms of this base (one that was quantised in training differs by up to 2 %)",
        "Name the base that the adapter was trained on; if this is it, magnitudes were trained at a very high rate.",
    ),
    "normalised-magnitudes": (
        "Magnitudes are near 1, as TensorRT-LLM's normaliser writes m / ||W0 + s B A||",
        "Convert with --from trtllm.",
    ),
    FROM_TORCHTUNE: (
        "Magnitudes fit the norms of this base in torchtune's order of rows only",
        "Convert with --from torchtune, whose exporter leaves magnitudes in its own order.",
    ),
    TO_TORCHTUNE: (
        "Magnitudes fit the norms of this base only if rows are put back from transformers' order into torchtune's",
        "They were put in order twice: do not read the file as torchtune's, or use the file that torchtune wrote.",
    ),
    COLUMNS: (
        "Magnitudes fit the norms of this base per input column, not per output row",
        "Convert with --axis input --refit from the file as it was made.",
    ),
}
_NAMES = {FROM_TORCHTUNE: "permuted-rows", TO_TORCHTUNE: "permuted-rows", COLUMNS: "transposed-scale"}


def of_norms(norms: list[Norms]) -> Iterator[Finding]:
    """Magnitudes that do not belong to this base, or not in this order, or never moved."""
    zero = tuple(n.path for n in norms if bool((n.composed == 0).any()))
    if zero:
        yield Finding(
            "zero-rows", zero, "Rows of W0 + s B A are zero here: plain PEFT divides by their norm and gives NaN.",
            "Load and save the adapter with dora_peft, which writes a tiny entry into B there.",
        )  # fmt: skip
    kinds: dict[str, list[Norms]] = {}
    for n in norms:
        kind = _kind(n)
        if kind is not None:
            kinds.setdefault(kind, []).append(n)
    for kind, found in kinds.items():
        what, mend = _SENTENCES[kind]
        mean = sum(n.distance for n in found) / len(found)
        yield Finding(
            _NAMES.get(kind, kind), tuple(n.path for n in found), f"{what}: mean |m / norm - 1| is {mean:.3g}.", mend
        )
    yield from _of_movement(norms)


def _kind(n: Norms) -> str | None:
    """Why magnitudes are far from the norms; None if they are not."""
    if n.fitting is not None or n.distance <= ANOTHER_BASE:
        return n.fitting
    near_one = (n.magnitude[n.composed > 0] - 1).abs().mean() < ANOTHER_BASE
    return "normalised-magnitudes" if near_one else "another-base"


def _of_movement(norms: list[Norms]) -> Iterator[Finding]:
    still = [n for n in norms if _as_initialised(n)]
    moved = tuple(n.path for n in still if bool((n.module.lora_B != 0).any()))
    if moved:
        yield Finding(
            "magnitudes-never-moved", moved,
            f"The magnitudes of {len(moved)} of {len(norms)} modules equal ||W0||, while B was trained.",
            "Train with magnitudes in fp32 and in the optimizer (dora_peft.param_groups).",
        )  # fmt: skip
    elif norms and len(still) == len(norms):
        yield Finding(
            "untrained", tuple(n.path for n in still), "All magnitudes equal ||W0||, and B is zero.",
            "This is the adapter before training: use a later checkpoint.",
        )  # fmt: skip


def _as_initialised(n: Norms) -> bool:
    # PEFT computes norms in the base's dtype, also for magnitudes that it keeps in fp32
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if bool((n.magnitude.to(dtype).double() == n.magnitude).all()):
            break
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return bool(((n.magnitude - n.before).abs() <= (AS_INITIALISED + rounding) * n.before).all())


def told_axis(finding: Finding, norms: list[Norms], source: Source) -> Finding:
    """A finding of one-dimensional scales that says which axis they fit in square layers."""
    flat = [key.removesuffix(".dora_scale") for key in flat_scales(source)]
    fits: dict[str, int] = {}
    for n in norms:
        names = (n.path, n.path.replace(".", "_"))
        if _is_square(n.module) and any(key == name or key.endswith(f"_{name}") for key in flat for name in names):
            columns = n.orders.get(COLUMNS, float("inf"))
            fit = "input" if n.fitting == COLUMNS else "output" if n.in_order * n.clearly < columns else "neither"
            fits[fit] = fits.get(fit, 0) + 1
    said = {
        "output": 'By the norms of this base "output" is the axis of {} square layers.',
        "input": 'By the norms of this base "input" is the axis of {} square layers.',
        "neither": "The norms of this base do not tell the axis of {} square layers.",
    }
    return replace(finding, found=" ".join([finding.found, *(said[fit].format(n) for fit, n in sorted(fits.items()))]))


def quantised(base: Base) -> dict[str, object] | None:
    """What the base's config says about how it is quantised."""
    kind = base.config.get("quantization_config")
    entries = kind if isinstance(kind, dict) else {"quant_method": str(kind)} if kind else {}
    return {name: getattr(value, "value", value) for name, value in entries.items()} or None


def of_quantisation(source: Source, base: Base) -> Iterator[Finding]:
    """A base that is quantised otherwise than the one of the training, or a folder that does not say by what."""
    mapping = (source.config or {}).get("auto_mapping")
    own = mapping.get("dora_peft") if isinstance(mapping, dict) else None
    record = own.get("base_quantization") if isinstance(own, dict) else None
    kind = quantised(base)
    if kind and not isinstance(record, dict):
        yield Finding(
            "quantisation-unrecorded", (), f"The base is quantised ({kind.get('quant_method')}), and the folder does "
            "not say by what it was trained over: over another kind the norms differ by up to 2 %.",
            "Save the adapter again over the base that it was trained on; dora_peft records the kind.",
        )  # fmt: skip
    elif isinstance(record, dict) and record:
        other = [name for name in _KINDS if kind and name in kind and name in record and kind[name] != record[name]]
        if not kind or other:
            now = _words(kind, other) if kind else "not quantised"
            yield Finding(
                "other-quantisation", (), f"The adapter was trained over a base quantised by {_words(record, other)}, "
                f"and this one is {now}: the norms differ by up to 2 %.", "Name the base as it was in training.",
            )  # fmt: skip


def _words(record: Mapping[str, object], other: list[str]) -> str:
    return ", ".join(f"{name} {record[name]}" for name in other or _KINDS[:1] if name in record) or "another method"
