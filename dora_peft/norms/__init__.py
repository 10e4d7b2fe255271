"""When v = ||W0 + s B A|| is refreshed.

v depends on A, B, s and W0 only, so it needs one refresh per optimizer step, whatever the number of forward passes.
Whether one is due is told by the content of A, B and W0 at every forward pass (ops/content.py), not by events:
optimizers, averaging helpers and trainers write through `.data`, raw pointers and copies, which nothing tells.

    state.py        v of an adapter, the check, and the refresh
    evaluation.py   what evaluation keeps beside v: c and the folded B
    operators.py    the same check for torch.compile, as an operator without side effects

A v that was handed out is never written to: a graph may hold it, at another scale or for other parameters.
"""

from .evaluation import Folded, folded
from .operators import traced
from .state import (
    BaseNorm,
    Norm,
    Snapshot,
    base_squared,
    checking,
    composed,
    initial,
    is_checking,
    refresh,
    register,
    settle,
    views,
    weight_norm,
)

__all__ = [
    "BaseNorm",
    "Folded",
    "Norm",
    "Snapshot",
    "base_squared",
    "checking",
    "composed",
    "folded",
    "initial",
    "is_checking",
    "refresh",
    "register",
    "settle",
    "traced",
    "views",
    "weight_norm",
]
