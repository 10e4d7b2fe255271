"""Contenders of the benchmark at toy size, and its options for a run of a moment."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bases import SHAPES, build_base
from benchmarks.contenders import Contender, build_contender

CPU = torch.device("cpu")
SMALL = ["--model", "tiny", "--device", "cpu", "--threads", "1", "--rounds", "1", "--warmup", "1", "--batch", "2"]


def make(name: str, base: nn.Module, dropout: float = 0.0, **options: Any) -> Contender:
    options = {"adapter_dtype": torch.float32, "seed": 0, "rank": 4, **options}
    return build_contender(name, base, dropout=dropout, **options)


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    return build_base(SHAPES["tiny"], 2, 128, dtype, CPU, 0)


def loss_of(contender: Contender) -> Tensor:
    ids = torch.arange(32).view(2, 16)
    return contender.call(input_ids=ids, labels=ids, use_cache=False).loss


def found_names(report: dict[str, Any]) -> list[str]:
    return list(report["results"][0]["contenders"])
