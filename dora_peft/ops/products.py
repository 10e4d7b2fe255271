"""Which library multiplies, and from how many tokens on a product is made from c (W0 + s B A) instead of W0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import LOW_PRECISION
from .torch_names import onednn_linear
from .workspace import workspace

# The most that c (W0 + s B A) may take.
COMPOSED_BYTES = 12 * 2**20
# Multiplications from which oneDNN is worth its start of 12 us.
_ONEDNN_LEAST = 2**21
# Below 64 rows the base model's own F.linear is used, so that an untrained adapter reproduces its output bit for bit.
_ONEDNN_LEAST_ROWS = 64
_NEVER = sys.maxsize


def _find_onednn() -> Callable[..., Tensor] | None:
    """oneDNN's fp32 product where it takes less time than MKL, torch's own choice; None to leave all to `F.linear`.

    That is on AMD processors with AVX-512, which oneDNN uses and MKL does not: by `scripts/benchmark_products.py` 0.81
    to 1.01 of MKL's time. Held to AVX2, oneDNN takes 0.85 to 1.15 of it there.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if "AMD" not in str(capabilities.get("cpu_name", "")) or not capabilities.get("avx512_f"):
        return None
    return onednn_linear()


_ONEDNN = _find_onednn()


def multiply_many(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W0^T + b [N, out] for so many rows x [N, in] that `Products` names this function."""
    if _ONEDNN is None or not torch.backends.mkldnn.enabled:
        return F.linear(rows, weight, bias)
    return _ONEDNN(rows, weight, bias, "none", [], "")


def times_transposed(thin: Tensor, wide: Tensor) -> Tensor:
    """thin^T wide [r, width] for u or du [N, r] and x or g [N, width], which are the gradients of A and of B^T.

    MKL splits the side of a result that is given first. Ranks below 16 it computes in a third of the time if that is
    the long one, and rows of a multiple of 2 KiB, which lie on the same lines of the cache, in two thirds.
    """
    rank, width = thin.shape[1], wide.shape[1]
    if rank < 16 or (rank <= 32 and width % 512 == 0):
        return thin.T @ wide
    return (wide.T @ thin).T


def least_rows(elements: int, dtype: torch.dtype, device: torch.device) -> int:
    """From how many rows on `multiply_many` multiplies by a matrix of so many elements."""
    if _ONEDNN is None or dtype is not torch.float32 or device.type != "cpu" or not elements:
        return _NEVER
    return max(_ONEDNN_LEAST_ROWS, -(-_ONEDNN_LEAST // elements))


@dataclass(frozen=True, slots=True)
class Products:
    """From how many tokens on a layer's products are made otherwise; decided once for a layer.

    Attributes:
        wide: By `multiply_many` in the products with W0.
        thin_in, thin_out: The same in those with A, and with B.
        composed: By c (W0 + s B A) instead of W0, see `composed_rows`.
        beside: Below so many, a new norm comes from rows of A beside x, see `beside_rows`; 0 for none.
    """

    wide: int = _NEVER
    thin_in: int = _NEVER
    thin_out: int = _NEVER
    composed: int = _NEVER
    beside: int = 0

    @classmethod
    def of(cls, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype, composes: bool) -> Products:
        """For W0 [out, in], None if the base layer multiplies by it, A [r, in] and B [out, r].

        Args:
            dtype: That of the products.
            composes: Whether W0 + s B A may be multiplied by at all: not by kernels, and not under autocast.
        """
        if lora_A.device.type != "cpu":
            return cls()
        thin_in = least_rows(lora_A.numel(), dtype, lora_A.device)
        thin_out = least_rows(lora_B.numel(), dtype, lora_A.device)
        if weight is None:
            return cls(_NEVER, thin_in, thin_out)
        wide = least_rows(weight.numel(), dtype, weight.device)
        # B A would be rounded away in low precision
        if not composes or dtype is not weight.dtype or weight.device.type != "cpu" or dtype in LOW_PRECISION:
            return cls(wide, thin_in, thin_out)
        return cls(wide, thin_in, thin_out, composed_rows(weight), beside_rows(weight, len(lora_A)))


def composed_rows(weight: Tensor) -> int:
    """From how many tokens on products with W0 [out, in] are made from c (W0 + s B A) instead.

    That scales out x in numbers instead of N x out, and does without the product and the sum of the low-rank branch. On
    a GPU, kernels fuse these passes. It pays from somewhat more tokens than there are features. Whether the norm is new
    does not matter, although W0 + s B A has just been made then: equal tensors give equal bits in every pass.
    """
    if weight.nbytes > COMPOSED_BYTES:
        return _NEVER
    both = sum(weight.shape)
    return -(-5 * weight.numel() // (2 * both)) if both else _NEVER


def beside_rows(weight: Tensor, rank: int) -> int:
    """Below how many tokens a new norm takes W0 A^T from the product with W0 [out, in], with A [r, in] beside x.

    W0 is read once for both then, where W0 + s B A would have to be written and read again. For each token it costs a
    copy of x and a y that is not written in place. The microseconds are fitted to 11 layers from 192 x 576 to
    4096 x 1536, r = 8 to 64, on two cores with AVX-512, and those that are lost in any case to whole training steps: a
    W0 that fits the cache is soon read again, and more operations are slow where a model has just used all of it.
    """
    out_features, in_features = weight.shape
    saved = weight.numel() * (0.37 - 0.0045 * rank) / 1000 - 300
    each = (0.56 * in_features + 0.28 * out_features) / 1000
    return max(0, int(saved / each)) if each else 0


def compose_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """V = W0 + s B A [out, in] in W0's dtype and layout; for a contiguous W0 into `out`, or the workspace, for this
    thread until the next call."""
    lora_A, scaled_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype) * scaling
    if weight.is_contiguous():
        out = workspace("composed", tuple(weight.shape), scaled_B) if out is None else out
        return torch.addmm(weight, scaled_B, lora_A, out=out)
    return torch.addmm(weight.T, lora_A.T, scaled_B.T).T
