"""An adapter as all formats mean it: factors, magnitude and scaling per module of the base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class UnreadableError(ValueError):
    """Files that are no adapter, or not whole, or what a format cannot hold; nothing was written."""


@dataclass(frozen=True)
class Module:
    """One module's W' = m * (W0 + s B A) / ||W0 + s B A||, norm per output row.

    Attributes:
        lora_A: A, [r, in]; [r, in, kernel ...] of a convolution.
        lora_B: B, [out, r]; [out, r, 1 ...] of a convolution.
        alpha: s r. That of rsLoRA, lora_alpha sqrt(r), is written like this too.
        magnitude: m, [out]; None in a plain LoRA.
        embedding: Whether it is a table of vectors, in which out is the length of one and in the number of rows.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / self.rank

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def in_features(self) -> int:
        """Those of the flattened kernel, of a convolution."""
        return self.lora_A[0].numel()

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], flattened if they are a convolution's."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1)


@dataclass
class Adapter:
    """What is in an adapter's files.

    Attributes:
        modules: By the module's path in the base model, as `named_modules` gives it.
        others: Trained tensors that belong to no adapted module, by their keys: biases, modules_to_save, token rows.
        config: The entries of PEFT's adapter_config.json that say more than `modules` does; empty if there is none.
        base: The base model's name, as the files have it.
        notes: What a reader should know about how the files were read, a sentence each.
    """

    modules: dict[str, Module]
    others: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    base: str | None = None
    notes: list[str] = field(default_factory=list)

    def with_magnitudes(self, change: Callable[[str, Module], Tensor]) -> Adapter:
        """The same with other magnitudes: change(path, module) gives m [out] of each module that has one."""
        modules = {
            path: module if module.magnitude is None else replace(module, magnitude=change(path, module))
            for path, module in self.modules.items()
        }
        return replace(self, modules=modules)


def check_holds(adapter: Adapter, name: str, *, convolutions: bool = False) -> None:
    """Refuse what a format of factors and magnitudes alone cannot hold.

    Raises:
        UnreadableError: The adapter has other trained tensors, embeddings, grouped convolutions, or, unless
            `convolutions`, any convolution.
    """
    if adapter.others:
        raise UnreadableError(
            f"{name} holds factors and magnitudes alone, and this adapter also has '{next(iter(adapter.others))}' "
            f"({len(adapter.others)} other trained tensors)."
        )
    check_layers(adapter, name, convolutions=convolutions)


def check_layers(adapter: Adapter, name: str, *, convolutions: bool = False) -> None:
    """The same for a format that holds other tensors as well."""
    for path, module in adapter.modules.items():
        if module.embedding:
            raise UnreadableError(f"{name} has no embeddings, and module '{path}' is one.")
        if module.lora_A.dim() > 2 and not convolutions:
            raise UnreadableError(f"{name} has linear layers alone, and module '{path}' is none.")
        if module.lora_B.shape[1] != module.rank:
            raise UnreadableError(f"{name} has no grouped convolutions, and module '{path}' is one.")


def one_rank(adapter: Adapter, name: str) -> tuple[int, float]:
    """The rank and s r of all modules.

    Raises:
        UnreadableError: They differ.
    """
    found = sorted({(module.rank, module.alpha) for module in adapter.modules.values()})
    if len(found) > 1:
        raise UnreadableError(
            f"{name} has one rank and one alpha for all modules, and this adapter has {len(found)}: (rank, alpha) "
            f"{', '.join(map(str, found[:3]))}."
        )
    return found[0]


def number_in(dtype: torch.dtype, value: float) -> Tensor:
    """A tensor of one number, in `dtype` if that holds it exactly, and otherwise in fp32 or fp64."""
    for candidate in (dtype, torch.float32):
        if torch.tensor(value, dtype=candidate).item() == value:
            return torch.tensor(value, dtype=candidate)
    return torch.tensor(value, dtype=torch.float64)
