"""From a file's tensors to modules whose parts fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from .adapter import Module, UnreadableError

# A, B, m and alpha of each module.
Parts = dict[str, dict[str, Tensor]]


def gather(tensors: Mapping[str, Tensor], told: Callable[[str], tuple[str, str] | None]) -> tuple[Parts, list[str]]:
    """Sort tensors by module.

    Args:
        tensors: By key.
        told: Gives the module and the part ("A", "B", "m", "alpha") that a key is of, None for one of neither.

    Returns:
        The parts of each module, and the keys of the other tensors.

    Raises:
        UnreadableError: Two keys are of the same part.
    """
    found: Parts = {}
    others: list[str] = []
    keys: dict[tuple[str, str], str] = {}
    for key, tensor in tensors.items():
        what = told(key)
        if what is None:
            others.append(key)
            continue
        path, part = what
        if part in found.setdefault(path, {}):
            raise UnreadableError(
                f"Module '{path}' has two tensors for the same part, '{keys[what]}' and '{key}': expected one. Remove "
                "the one that does not belong to this adapter."
            )
        found[path][part], keys[what] = tensor, key
    return found, others


def make_module(path: str, parts: Mapping[str, Tensor], alpha: object, *, embedding: bool = False) -> Module:
    """A module of its parts A, B and, if there is one, m.

    Args:
        path: The module, for errors.
        parts: A [r, in, kernel ...], B [out, r, 1 ...], m of out numbers in any shape.
        alpha: s r.
        embedding: See `Module`.

    Raises:
        UnreadableError: A factor is missing, the parts do not fit together, or they are no numbers.
    """
    mend = "Use an intact checkpoint, or save the adapter again."
    if "A" not in parts or "B" not in parts:
        has, lacks = ("lora_A", "lora_B") if "A" in parts else ("lora_B", "lora_A")
        what = f"has {has} and no {lacks}" if has[-1] in parts else "has no lora_A and no lora_B, a magnitude alone"
        raise UnreadableError(f"Module '{path}' {what}: expected both factors. {mend}")
    lora_A, lora_B, magnitude = parts["A"], parts["B"], parts.get("m")
    for name, tensor in parts.items():
        if name != "alpha" and not tensor.is_floating_point():
            raise UnreadableError(f"Module '{path}': expected floating point numbers, found {tensor.dtype}. {mend}")
    shapes = f"A {list(lora_A.shape)} and B {list(lora_B.shape)}"
    kernel = lora_A.dim() > 2
    fits = lora_A.dim() == lora_B.dim() and 2 <= lora_A.dim() <= (2 if embedding else 5)
    # that of a grouped convolution reads the ranks of its group
    fits = fits and lora_A.numel() > 0 and lora_B.numel() > 0
    fits = fits and (lora_B.shape[1] == len(lora_A) or (kernel and len(lora_A) % lora_B.shape[1] == 0))
    if not (fits and all(size == 1 for size in lora_B.shape[2:])):
        raise UnreadableError(f"Module '{path}' has {shapes}: expected [r, in] and [out, r] with one rank r. {mend}")
    if magnitude is not None and magnitude.numel() != len(lora_B):
        raise UnreadableError(
            f"Module '{path}' has magnitudes {list(magnitude.shape)} beside {shapes}: expected one for each of the "
            f"{len(lora_B)} output rows. {mend}"
        )
    magnitude = None if magnitude is None else magnitude.flatten()
    return Module(lora_A, lora_B, number(alpha, f"Module '{path}': alpha"), magnitude, embedding)


def rank_of(parts: Mapping[str, Tensor]) -> int:
    """The rows of A; 0 without one, which `make_module` names."""
    return next(iter(parts["A"].shape), 0) if "A" in parts else 0


def number(value: object, what: str) -> float:
    """A finite number.

    Raises:
        UnreadableError: It is none; `what` begins the sentence.
    """
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UnreadableError(
            f"{what} should be a finite number, found {str(value)[:40]}. Restore what was saved with the tensors."
        )
    return found
