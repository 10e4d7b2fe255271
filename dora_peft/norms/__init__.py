"""When v = ||W0 + s B A|| is refreshed.

v depends on A, B, s and W0 only, so it needs one refresh per optimizer step, whatever the number of forward passes.
Whether one is due is decided by the content of A, B and W0 at every forward pass (ops/content.py), not by events:
optimizers, averaging helpers and trainers write through `.data`, raw pointers and copies, which nothing announces.

    adapted.py      what this folder needs of a layer
    records.py      what it writes into a layer
    state.py        v of an adapter, the check, and the refresh
    shared.py       the refresh amid a training pass
    lifecycle.py    what becomes of the records when a layer is moved, copied or loaded
    device.py       the same on a device with kernels
    grouped.py      the same for all layers of a model at once, at the start of its forward pass
    evaluation.py   what evaluation keeps beside v: c and the folded B
    operators.py    the same check for torch.compile, as an operator without side effects
    ties.py         which rows have a magnitude that follows their norm

A v that was handed out is never written to: a graph may hold it, at another scale or for other parameters.
"""

from .adapted import AdaptedLayer
from .evaluation import folded
from .grouped import gather, scatter
from .lifecycle import drop, forget, is_settled, leave_evaluation, let_go, replicate, settle_as
from .operators import register, traced, traced_ties
from .records import BaseNorm, Folded, Norm, Snapshot, Stored
from .shared import refreshed_amid
from .state import (
    base_squared,
    checking,
    computes_by_kernels,
    fresh,
    initial,
    is_checking,
    refresh,
    refreshed,
    settle,
    up_to_date,
    views,
)

__all__ = [
    "AdaptedLayer",
    "BaseNorm",
    "Folded",
    "Norm",
    "Snapshot",
    "Stored",
    "base_squared",
    "checking",
    "computes_by_kernels",
    "drop",
    "folded",
    "forget",
    "fresh",
    "gather",
    "initial",
    "is_checking",
    "is_settled",
    "leave_evaluation",
    "let_go",
    "refresh",
    "refreshed",
    "refreshed_amid",
    "register",
    "replicate",
    "scatter",
    "settle",
    "settle_as",
    "traced",
    "traced_ties",
    "up_to_date",
    "views",
]
