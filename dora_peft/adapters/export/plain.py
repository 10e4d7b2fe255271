"""One plain LoRA that PEFT, vLLM, SGLang and llama.cpp read the same.

Servers differ in what they take from a config: SGLang alpha / r alone, llama.cpp one alpha over the rank of each
tensor, vLLM a rank up to the one of its list that it was started with. So there is one rank for all modules, from
that list, with zeros where a module has less; alpha = rank, so that s = 1 and all scaling is inside B; no patterns, no
rslora.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..formats import FORMATS, Adapter, Files, Module, UnreadableError
from ..formats.source import CONFIG

# What vLLM 0.33 takes as --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Factors:
    """Those of one module, of any rank.

    Attributes:
        lora_A, lora_B: [k, in] and [out, k], floats, with all scaling inside.
        embedding: Whether the module is an embedding, whose out is the length of a vector.
        kernel: (in_channels / groups, kernel sizes ...) of a convolution, whose product is in.
    """

    lora_A: Tensor
    lora_B: Tensor
    embedding: bool = False
    kernel: tuple[int, ...] = ()

    def rounded(self, dtype: torch.dtype) -> Factors:
        """The same product from balanced factors in `dtype`, or in fp32 if a value overflows it.

        Row i of A and column i of B are brought to the same size by a power of two, which rounds nothing: fp16 has its
        smallest numbers at 6e-8, and would lose those of the smaller factor first.
        """
        A, B = self.lora_A.double(), self.lora_B.double()
        of_A, of_B = A.square().mean(1).sqrt(), B.square().mean(0).sqrt()
        # a component with a factor of 0 is 0
        live = (of_A > 0) & (of_B > 0)
        half = torch.where(live, (of_B / of_A).log2() / 2, 0.0).round().exp2()
        A, B = A * (half * live)[:, None], B * (live / half)
        narrow = A.to(dtype), B.to(dtype)
        if not all(bool(torch.isfinite(factor).all()) for factor in narrow):
            narrow = A.float(), B.float()
        return replace(self, lora_A=narrow[0], lora_B=narrow[1])

    def cut(self, rank: int) -> Factors:
        """The first `rank` components."""
        return replace(self, lora_A=self.lora_A[:rank], lora_B=self.lora_B[:, :rank])


def listed_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds one.

    Raises:
        UnreadableError: None does.
    """
    for listed in RANKS:
        if rank <= listed:
            return listed
    raise UnreadableError(f"Rank {rank} is more than the {RANKS[-1]} that vLLM takes: expected one of {_list()}.")


def check_rank(rank: int) -> None:
    """Refuse a rank that is none of vLLM's: padded to the next one, it would be as large and less exact.

    Raises:
        UnreadableError: The next one is named.
    """
    if rank not in RANKS:
        mend = f"choose {listed_rank(rank)}" if 0 < rank <= RANKS[-1] else "choose one of them"
        raise UnreadableError(f"--rank {rank}: expected one that vLLM takes, {_list()}; {mend}.")


def _list() -> str:
    return " ".join(map(str, RANKS))


def padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """A factor with zeros behind its own rank, which lies along `dim`."""
    missing = rank - factor.shape[dim]
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim) if missing else factor


def plain_modules(factors: Mapping[str, Factors], rank: int) -> tuple[dict[str, Module], list[str]]:
    """The modules of a plain LoRA of one rank and dtype, and what a reader should know.

    Args:
        factors: By the module's path in the base model, each as `Factors.rounded` gives it: all are written in fp32 if
            one is.
        rank: One of `RANKS`, at least each module's own.

    Raises:
        UnreadableError: A module has a larger rank, or values that are not finite.
    """
    dtypes = {own.lora_A.dtype for own in factors.values()}
    dtype = torch.float32 if len(dtypes) > 1 else next(iter(dtypes))
    notes = []
    if len(dtypes) > 1:
        wide = [path for path, own in factors.items() if own.lora_A.dtype == dtype]
        narrow = ", ".join(str(kind).removeprefix("torch.") for kind in dtypes - {dtype})
        notes.append(
            f"warning: the adapter is in fp32: {narrow} overflows in '{wide[0]}' ({len(wide)} of {len(factors)} "
            "modules)"
        )
    modules = {}
    for path, own in factors.items():
        if len(own.lora_A) > rank:
            raise UnreadableError(f"Module '{path}' has rank {len(own.lora_A)}: expected at most {rank}.")
        if not bool(torch.isfinite(own.lora_A).all() and torch.isfinite(own.lora_B).all()):
            raise UnreadableError(f"Module '{path}' holds NaN or infinite values: expected finite factors.")
        A, B = padded(own.lora_A, rank, 0).to(dtype), padded(own.lora_B, rank, 1).to(dtype)
        if own.kernel:
            A, B = A.view(rank, *own.kernel), B.view(*B.shape, *(1 for _ in own.kernel[1:]))
        modules[path] = Module(A.contiguous(), B.contiguous(), float(rank), embedding=own.embedding)
    return modules, notes


def plain_files(
    modules: Mapping[str, Module], base_name: str, *, fan_in_fan_out: bool = False, task_type: str | None = None
) -> Files:
    """The folder of such modules: adapter_model.safetensors and an adapter_config.json that no reader warns of.

    Args:
        modules: All of one rank, with alpha = rank, from `plain_modules`.
        base_name: The base's folder, or "owner/name[@revision]" on the Hub: vLLM and PEFT load it by this.
        fan_in_fan_out: The adapted modules are GPT-2's Conv1D.
        task_type: PEFT's, such as "CAUSAL_LM".
    """
    named, _, revision = (base_name, "", "") if Path(base_name).exists() else base_name.partition("@")
    files = FORMATS["peft"].write(Adapter(dict(modules), base=named), None)
    rank = next(iter(modules.values())).rank
    config = {
        **files.json[CONFIG],
        "revision": revision or None,
        "lora_alpha": rank,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "fan_in_fan_out": fan_in_fan_out,
        "task_type": task_type,
    }
    return replace(files, json={CONFIG: config})


def plain_adapter(
    factors: Mapping[str, Factors],
    dtype: torch.dtype,
    base_name: str,
    *,
    rank: int | None = None,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
) -> tuple[Files, list[str]]:
    """A plain LoRA for all servers from factors of any ranks, and what a reader should know.

    Args:
        factors: By the module's path in the base model.
        dtype: Of the tensors; fp32 if a value overflows it, with a note.
        base_name, fan_in_fan_out, task_type: See `plain_files`.
        rank: One of `RANKS`; the smallest that holds all modules if None.

    Raises:
        UnreadableError: There are no modules, or one has a larger rank than vLLM takes or values that are not finite.
    """
    if not factors:
        raise UnreadableError("The adapter changes no module, so that there is no LoRA to write.")
    if rank is None:
        rank = listed_rank(max(len(own.lora_A) for own in factors.values()))
    check_rank(rank)
    modules, notes = plain_modules({path: own.rounded(dtype) for path, own in factors.items()}, rank)
    return plain_files(modules, base_name, fan_in_fan_out=fan_in_fan_out, task_type=task_type), notes
