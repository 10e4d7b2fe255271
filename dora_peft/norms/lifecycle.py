"""What becomes of a layer's records when the layer is loaded, moved, copied, or loses an adapter."""

from __future__ import annotations

from torch import Tensor

from .adapted import AdaptedLayer
from .records import Norm


def settle_as(layer: AdaptedLayer, adapter: str, tied: Tensor | None) -> None:
    """Give an adapter a new record, with these rows tied (bool [out], None for none)."""
    layer._norms[adapter] = Norm(tied=tied, settled=True)


def unsettle(layer: AdaptedLayer, adapter: str) -> None:
    """Give an adapter a new record; which rows are tied is found out at the next use."""
    layer._norms[adapter] = Norm()


def drop(layer: AdaptedLayer, adapter: str) -> None:
    """Forget an adapter that is deleted, or on the meta device."""
    layer._norms.pop(adapter, None)


def let_go(layer: AdaptedLayer) -> None:
    """Of memory that is about to be moved."""
    if layer._base_norm is not None:
        layer._base_norm.weight.let_go()
    for norm in layer._norms.values():
        norm.device = None


def forget(layer: AdaptedLayer) -> None:
    """Of all that was computed of W0, which is going: its norm and copies of A and B. Which rows are tied is kept."""
    layer._norms = {name: Norm(tied=n.tied, settled=n.settled) for name, n in layer._norms.items()}
    layer._base_norm = None


def replicate(layer: AdaptedLayer, replica: AdaptedLayer) -> None:
    """Give a replica, which computes on another device and in another thread, its records."""
    replica._norms = {name: Norm(tied=n.tied, settled=n.settled) for name, n in layer._norms.items()}
    replica._base_norm = None


def is_settled(layer: AdaptedLayer, adapter: str) -> bool:
    """Whether it is known which rows of an adapter are tied."""
    norm = layer._norms.get(adapter)
    return norm is not None and norm.settled


def leave_evaluation(layer: AdaptedLayer) -> None:
    """Drop what evaluation keeps beside A and B."""
    for norm in layer._norms.values():
        norm.folded = None
