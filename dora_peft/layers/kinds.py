"""The kinds of layers that DoRA adapts: linear, embedding, convolution. What they share is in layer.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import norms
from ..bases.inspection import linear_map
from ..config import DoraConfig
from ..ops import choice, functional, linear
from .layer import DoraLayer, changed_too_early


class Shortcut:
    """Evaluation of a linear layer with one adapter, for as long as nothing that it was made from has changed.

    Decoding calls each layer for one token at a time, so that asking the modules for everything anew would take as
    long as the products.
    """

    def __init__(self, layer: Any, adapter: str, weight: Tensor, kept: norms.Folded) -> None:
        self.adapter, self.kept, self.active = adapter, kept, layer._active_adapter
        self.base = layer.base_layer
        self.stored, self.weight, self.bias = self.base.weight, weight, self.base.bias

    def is_open(self, layer: Any) -> bool:
        """Whether calling this computes what the layer would."""
        if torch.is_grad_enabled() or layer.training or layer._disable_adapters or choice.by_autograd():
            return False
        base, kept, adapter = self.base, self.kept, self.adapter
        if (
            layer._modules["base_layer"] is not base
            or layer._active_adapter != self.active
            or base._forward_hooks
            or base._forward_pre_hooks
            or "forward" in base.__dict__
            or base._parameters.get("weight") is not self.stored  # exchanged, or merged
            or base._parameters.get("bias") is not self.bias
            or norms.is_checking()
        ):
            return False
        lora_A, lora_B = layer.factor_parameters(adapter)
        fits = kept.known.fits(lora_A, lora_B, layer.scaling[adapter], self.stored)
        return fits and kept.magnitude.fits(layer.magnitude(adapter))

    def __call__(self, x: Tensor, layer: Any) -> Tensor:
        kept = self.kept
        lora_A = layer.factor_parameters(self.adapter)[0] if kept.lora_A is None else kept.lora_A
        return linear.linear_eval(x, lora_A, kept.lora_B, kept.c, weight=self.weight, bias=self.bias)


class BaseProduct:
    """The base layer as a product, for the backward pass of a weight that is not at hand as a dense matrix."""

    def __init__(self, layer: Linear, bias: Tensor | None, args: Any, kwargs: Any) -> None:
        self.layer, self.bias, self.args, self.kwargs = layer, bias, args, kwargs
        self.weight = layer.held_weight()

    def __call__(self, x: Tensor, index: Tensor | None) -> Tensor:
        """x W0^T without b, [..., len(index)] for these rows of W0, [..., out] where None."""
        weight = self._seam()
        if index is not None and weight.has_rows:
            return F.linear(x, weight.rows(index).to(x.dtype))
        base: Any = self.layer.base_layer
        plain = not self.args and not self.kwargs and base is self.layer.get_base_layer() and x.numel() > 0
        module, bias = linear_map(base, x.flatten(0, -2)) if plain and self.bias is not None else (base, self.bias)
        # as in the forward pass: some libraries compute otherwise if no gradient is needed, and repack their weight
        with torch.enable_grad():
            out = module(x.detach().requires_grad_(x.requires_grad), *self.args, **self.kwargs).detach()
        if bias is not None:
            wide = torch.promote_types(out.dtype, torch.float32)
            out = out.to(wide) - bias.to(wide)
        return out if index is None else out[..., index]

    def stored(self) -> Any:
        return self._seam().stored()

    def _seam(self) -> Any:
        if self.layer.held_weight() is not self.weight:
            raise changed_too_early(self.layer.name)
        return self.layer.base_weight()


class Linear(DoraLayer, nn.Module):
    """DoRA on nn.Linear, transformers' Conv1D, and every quantised linear layer."""

    peft_layer = lora.Linear

    def _own_forward(self, base: Any) -> bool:
        if type(base) is nn.Linear or type(base) is Conv1D or self._multiplies(type(base).forward):
            return False
        weight = base._parameters.get("weight")
        return type(weight) is nn.Parameter and weight.is_floating_point() and not hasattr(base, "qweight")

    def adapt_fast(self, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.magnitude_only[adapter]:
            return super().adapt_fast(adapter, x, *args, **kwargs)
        weight = None if args or kwargs else self._dense_weight()
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        lora_A, lora_B = self.factor_parameters(adapter)
        base_out = None if weight is not None else self._base_output(x, *args, **kwargs)
        bias = self._bias()  # after the call: some libraries round it to the dtype of x, for good
        known = direction = None
        if not self.training and not torch.is_grad_enabled():
            known = norms.weight_norm(self, adapter)
            if known.base is not None:  # on a device nothing is looked up, so there is nothing to fold beforehand
                kept = norms.folded(self, adapter, known)
                self._shortcut = None if weight is None else Shortcut(self, adapter, weight, kept)
                cast_A = lora_A if kept.lora_A is None else kept.lora_A
                return linear.linear_eval(x, cast_A, kept.lora_B, kept.c, weight=weight, bias=bias, base_out=base_out)
        elif weight is not None and not p and linear.composes(x, weight):
            known, direction = norms.composed(self, adapter)

        return linear.linear(
            x,
            lora_A,
            lora_B,
            self.scale(adapter, differentiable=True, known=known),
            self.scaling[adapter],
            weight=weight,
            bias=bias,
            base_out=base_out,
            base_product=None if base_out is None else BaseProduct(self, bias, args, kwargs),
            dropout_p=p,
            direction=direction,
            outputs=self._outputs,
        )

    def adapt_compiled(self, adapter: str, x: Tensor) -> Tensor | None:
        weight = self._dense_weight()
        if weight is None or self.magnitude_only[adapter] or self._drops_base(adapter):
            return None
        if not choice.uses_kernels(x.device, x.dtype, weight.dtype):
            return None
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        c = self.scale(adapter, differentiable=True)
        factors = self.factor_parameters(adapter)
        return linear.linear_operator(x, weight, self._bias(), *factors, c, self.scaling[adapter], p, self.number)

    def _multiplies(self, forward: Any) -> bool:
        return forward is nn.Linear.forward or forward is Conv1D.forward

    def _oriented(self, weight: Tensor) -> Tensor:
        """W0 [out, in]."""
        return weight.T if type(self.base_layer).forward is Conv1D.forward else weight

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def _low_rank(
        self,
        adapter: str,
        x: Tensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float | None = None,
    ) -> Tensor:
        if lora_A is None or lora_B is None:
            lora_A, lora_B = self.factor_parameters(adapter)
        return functional.linear_branch(x, lora_A, lora_B, self.scaling[adapter] if scaling is None else scaling)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def _to_layout(self, delta: Tensor) -> Tensor:
        return delta.T if self.fan_in_fan_out else delta


class Embedding(DoraLayer, nn.Module):
    """DoRA on nn.Embedding: `out` is the embedding dimension, norms run over the vocabulary, no dropout."""

    peft_layer = lora.Embedding

    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _dropped(self, adapter: str, x: Tensor) -> Tensor:
        return x  # ids

    def _drops_base(self, adapter: str) -> bool:
        return False

    def _low_rank(
        self,
        adapter: str,
        x: Tensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float | None = None,
    ) -> Tensor:
        base = self.get_base_layer()
        if lora_A is None or lora_B is None:
            lora_A, lora_B = self.factor_parameters(adapter)
        return functional.embedding_branch(
            x,
            lora_A,
            lora_B,
            self.scaling[adapter] if scaling is None else scaling,
            embed_scale=self._get_embed_scale(),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )

    def _multiplies(self, forward: Any) -> bool:
        return forward is nn.Embedding.forward and self.get_base_layer().max_norm is None  # which writes to its weight

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        base = self.get_base_layer()
        return F.embedding(x, weight, base.padding_idx, None, 2.0, base.scale_grad_by_freq, base.sparse)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def _to_layout(self, delta: Tensor) -> Tensor:
        return delta.T


class _ConvNd(DoraLayer):
    """DoRA on a convolution; norms run over the flattened kernel, m is [1, out, 1, ...] as in PEFT."""

    def update_layer(self, adapter_name: str, *, r: int, config: DoraConfig, **kwargs: Any) -> None:
        base = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                f"not target this specific layer. (module '{self.name}', rank_pattern sets the rank of one module)"
            )
        super().update_layer(adapter_name, r=r, config=config, **kwargs)

    def _magnitude_shape(self, out_features: int) -> tuple[int, ...]:
        return (1, out_features, *(1 for _ in self.get_base_layer().kernel_size))

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
        groups = self.get_base_layer().groups
        if groups > 1:  # B reads the ranks of its own group only
            lora_B = torch.block_diag(*lora_B.unflatten(0, (groups, -1)))
        return lora_A, lora_B

    def _low_rank(
        self,
        adapter: str,
        x: Tensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float | None = None,
    ) -> Tensor:
        if lora_A is None or lora_B is None:
            lora_A, lora_B = self.factor_parameters(adapter)
        scaling = self.scaling[adapter] if scaling is None else scaling
        return functional.conv_branch(x, lora_A, lora_B, scaling, self.get_base_layer())

    def _multiplies(self, forward: Any) -> bool:
        return forward is nn.Conv1d.forward or forward is nn.Conv2d.forward or forward is nn.Conv3d.forward

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.get_base_layer()._conv_forward(x, weight, None)

    def _per_channel(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.get_base_layer().kernel_size))  # batched and unbatched input alike

    def _mergeable(self) -> bool:
        base = self.get_base_layer()
        return base.groups == 1 and base.padding_mode == "zeros"

    def _merge_obstacle(self) -> str:
        base = self.get_base_layer()
        if base.groups > 1:
            return f"A crosses its {base.groups} groups, so the composed kernel is not a grouped one."
        return f"its base pads with '{base.padding_mode}' and the low-rank branch with zeros."

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _to_layout(self, delta: Tensor) -> Tensor:
        return delta.view(self.get_base_layer().weight.shape)


class Conv1d(_ConvNd, nn.Module):
    peft_layer = lora.layer.Conv1d


class Conv2d(_ConvNd, nn.Module):
    peft_layer = lora.layer.Conv2d


class Conv3d(_ConvNd, nn.Module):
    peft_layer = lora.layer.Conv3d


def layer_class(base_layer: nn.Module) -> type[DoraLayer] | None:
    """The class that adapts `base_layer`, None where there is none."""
    kinds: tuple[tuple[type | tuple[type, ...], type[DoraLayer]], ...] = (
        (nn.Embedding, Embedding),
        (nn.Conv1d, Conv1d),
        (nn.Conv2d, Conv2d),
        (nn.Conv3d, Conv3d),
        (nn.MultiheadAttention, DoraLayer),
        ((nn.Linear, Conv1D), Linear),
    )
    for kind, cls in kinds:
        if isinstance(base_layer, kind):
            return None if cls is DoraLayer else cls
    # quantised linear layers that do not derive from nn.Linear
    if hasattr(base_layer, "in_features") and hasattr(base_layer, "out_features"):
        return Linear
    return None
