"""A linear layer's forward and backward pass whose shapes, strides and dtypes are those of an earlier one.

All that follows from these is worked out once: grids, block counts, shapes of what is allocated, and which machine code
is launched. What `fused.forward` and `fused.gradients` compute is computed in the same order by the same kernels.

Equal layers of a model share a plan. Only the usual case has one: a dense weight in the dtype of x, contiguous x, A and
B, at most 64 ranks; see `plan_for`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kept_output
from . import dropout, sample
from . import linear as kernels
from .options import Seed, precision, threshold
from .prepared import Prepared

# Plans that are remembered: a few layouts of layers at each length of a batch.
_MOST = 4096
_plans: dict[tuple[object, ...], Plan | None] = {}


def plan_for(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, c: Tensor, p: float
) -> Plan | None:
    """The plan for these tensors, None if they are not of the usual case.

    Args:
        x: [..., in].
        weight, bias, lora_A, lora_B, c: As of `fused.forward`.
        p: Probability to drop an element of x before A.
    """
    dtype, device = x.dtype, x.get_device()
    key = (
        device, dtype, x.shape, x.is_contiguous(),
        weight.get_device(), weight.dtype, weight.shape, weight.stride(),
        lora_A.get_device(), lora_A.dtype, lora_A.shape, lora_A.is_contiguous(),
        lora_B.get_device(), lora_B.dtype, lora_B.shape, lora_B.is_contiguous(),
        c.get_device(), c.dtype, p,
        None if bias is None else (bias.get_device(), bias.dtype),
        dtype is torch.float32 and precision(dtype),
    )  # fmt: skip
    try:
        return _plans[key]
    except KeyError:
        pass
    if len(_plans) >= _MOST:
        _plans.clear()
    usual = (
        x.dim() > 1 and x.numel() > 0 and x.is_contiguous() and weight.dtype is dtype and c.dtype is torch.float32
        and len(lora_A) <= kernels.MANY_RANKS and lora_A.is_contiguous() and lora_B.is_contiguous()
        and {weight.get_device(), lora_A.get_device(), lora_B.get_device(), c.get_device()} == {device}
        and (bias is None or (bias.dtype is dtype and bias.get_device() == device))
        and x.numel() // x.shape[-1] * max(weight.shape) < 2**31
    )  # fmt: skip
    plan = _plans[key] = Plan(x, len(weight), len(lora_A), lora_A.dtype, p) if usual else None
    return plan


def forget() -> None:
    """Have every plan be made anew."""
    _plans.clear()


class Plan:
    """What is launched and allocated for a layer of one layout.

    Attributes:
        kept: The exact probability to keep an element of x before A.
    """

    def __init__(self, x: Tensor, width: int, rank: int, adapter: torch.dtype, p: float) -> None:
        features = x.shape[-1]
        length = x.numel() // features
        self.p, self.kept = p, threshold(p)[1]
        self.x_shape, self.u_shape, self.y_shape = (length, features), (length, rank), (length, width)
        self.whole_shape = (*x.shape[:-1], width)
        self.sums_shape = (kernels.striped(length, width)[1], width)
        self._set_up_sample(length, width, x.dtype)
        self._set_up_dropout(length, features, rank, x.dtype, adapter)

        def scaled_sum(z: Tensor, u: Tensor, lora_B: Tensor, c: Tensor, bias: Tensor | None, k: float) -> None:
            kernels.scaled_sum(z, u, lora_B, c, bias, k, out=z)

        def scale_and_sum(g, c, y, bias, scaled, sums) -> None:
            kernels.scale_and_sum(g.view(length, width), c, y.view(length, width), bias, into=(scaled, sums))

        def magnitude_gradient(sums, g, y, rows, weight, u, lora_B, c, bias, k, kept, out) -> None:
            kernels.magnitude_gradient(
                sums, g.view(length, width), y.view(length, width), rows, weight, u, lora_B, c, bias, k,
                sample.changed(kept), out=out,
            )  # fmt: skip

        self._scaled_sum = Prepared(scaled_sum, {5: "scaling"})
        self._scale_and_sum = Prepared(scale_and_sum)
        self._magnitude_gradient = Prepared(magnitude_gradient, {9: "k"})

    def _set_up_sample(self, length: int, width: int, dtype: torch.dtype) -> None:
        self.layout = kept_output.layout(torch.Size((length, width)))
        _, _, count, step, elements = self.layout
        size = count * width
        self.sample_size = sample.sample_size(size, elements, dtype)

        def keep(y: Tensor, kept: Tensor, offset: int, start: int) -> None:
            sample.keep_sample(y, kept, offset, start, step, size, elements)

        def find(y: Tensor, kept: Tensor, offset: int, start: int) -> None:
            sample.find_change(y, kept, offset, start, step, size)

        self._keep_sample = Prepared(keep, {2: "offset", 3: "start"})
        self._find_change = Prepared(find, {2: "offset", 3: "start"})

    def _set_up_dropout(self, length: int, features: int, rank: int, dtype: torch.dtype, adapter: torch.dtype) -> None:
        p = self.p
        self.stripes = dropout.striped(length, features, rank, dtype)[1]
        self.parts_shape, self.parts_dtype = (self.stripes * rank, features), adapter
        if self.stripes > 1:
            self.parts_dtype = torch.float32

        def product(rows: Tensor, lora_A: Tensor, seed: Seed, out: Tensor) -> None:
            dropout.dropped_product(rows, lora_A, seed, p, out=out)

        def add(dx: Tensor, du: Tensor, lora_A: Tensor, seed: Seed) -> None:
            dropout.add_low_rank(dx, du, lora_A, seed, p)

        def gradient(du: Tensor, rows: Tensor, seed: Seed, parts: Tensor) -> None:
            dropout.dropped_gradient(du, rows, seed, p, adapter, parts=parts)

        self._dropped_product = Prepared(product, {2: "seed"})
        self._add_low_rank = Prepared(add, {3: "seed"})
        self._dropped_gradient = Prepared(gradient, {2: "seed"})

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        c: Tensor,
        k: float,
        seed: int | None,
    ) -> tuple[Tensor, Tensor]:
        """y [..., out] and u [N, r], see `fused.forward`."""
        rows = x.view(self.x_shape)
        if seed is None:
            u = F.linear(rows, lora_A if lora_A.dtype is x.dtype else lora_A.to(x.dtype))
        else:
            u = x.new_empty(self.u_shape)
            self._dropped_product.call(rows, lora_A, seed, u)
        # `F.linear` of more than two dimensions may give a view, which nobody could change in place
        y = x.new_empty(self.whole_shape)
        z = y if x.dim() == 2 else y.view(self.y_shape)
        if bias is None:
            torch.mm(rows, weight.t(), out=z)
        else:
            torch.addmm(bias, rows, weight.t(), out=z)
        self._scaled_sum.call(z, u, lora_B, c, bias, k)
        return y, u

    def keep_sample(self, y: Tensor) -> tuple[Tensor, int, int]:
        """Some elements of y [..., out], and where they are from."""
        first, start = kept_output.draw(*self.layout)
        offset = first * self.layout[1]
        kept = y.new_empty(self.sample_size)
        self._keep_sample.call(y, kept, offset, start)
        return kept, offset, start

    def find_change(self, y: Tensor, kept: Tensor, offset: int, start: int) -> None:
        """Have the device write down in `kept` whether y holds something else, see `sample.changed`."""
        self._find_change.call(y, kept, offset, start)

    def gradients(
        self,
        g: Tensor,
        y: Tensor,
        x: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        c: Tensor,
        k: float,
        seed: int | None,
        kept: Tensor,
        need_x: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Those of x, A, B and c, see `fused.gradients`, for contiguous g and y [..., out]."""
        scaled, sums = g.new_empty(self.y_shape), c.new_empty(self.sums_shape)
        self._scale_and_sum.call(g, c, y, bias, scaled, sums)
        rows, d_c = x.view(self.x_shape), torch.empty_like(c)
        self._magnitude_gradient.call(sums, g, y, rows, weight, u, lora_B, c, bias, k, kept, d_c)
        dtype = x.dtype
        B = lora_B if lora_B.dtype is dtype else lora_B.to(dtype)
        # u and B give the shapes alone
        d_B = torch.addmm(B, scaled.t(), u, beta=0, alpha=k)
        du = torch.addmm(u, scaled, B, beta=0, alpha=k)
        if seed is None:
            d_A = torch.mm(du.t(), rows)
            if not need_x:
                return None, d_A, d_B, d_c
            dx = torch.mm(scaled, weight)
            dx.addmm_(du, lora_A if lora_A.dtype is dtype else lora_A.to(dtype))
        else:
            d_A = self._gradient_of_A(du, rows, seed)
            if not need_x:
                return None, d_A, d_B, d_c
            dx = torch.mm(scaled, weight)
            self._add_low_rank.call(dx, du, lora_A, seed)
        return dx.view(x.shape), d_A, d_B, d_c

    def _gradient_of_A(self, du: Tensor, rows: Tensor, seed: int) -> Tensor:
        parts = torch.empty(self.parts_shape, dtype=self.parts_dtype, device=du.device)
        self._dropped_gradient.call(du, rows, seed, parts)
        return parts if self.stripes == 1 else dropout.summed(parts, self.stripes)
