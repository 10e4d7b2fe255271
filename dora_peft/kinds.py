"""The kinds of layers that DoRA adapts: linear, embedding, convolution. What they share is in layer.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import choice, functional, linear
from . import norm as _norm
from .config import DoraConfig
from .layer import DoraLayer


class Shortcut:
    """Evaluation of a linear layer with one adapter, for as long as nothing that it was made from has changed.

    Decoding calls each layer for one token at a time, so that asking the modules for everything anew would take as
    long as the products.
    """

    def __init__(self, layer: Any, adapter: str, weight: Tensor) -> None:
        self.norm = layer._norms[adapter]
        self.folded = self.norm.folded
        self.scaling, self.adapter, self.active = layer.scaling[adapter], adapter, layer._active_adapter
        self.base = layer.base_layer
        self.weight, self.bias = weight, self.base.bias
        lora_A, lora_B = layer.factor_parameters(adapter)
        self.lora_A = lora_A.detach().to(weight.dtype)
        modules = layer._modules
        owners = {
            modules["lora_A"]._modules[adapter]: lora_A,
            modules["lora_B"]._modules[adapter]: lora_B,
            modules["lora_magnitude_vector"]._modules[adapter]: layer.magnitude(adapter),
            self.base: self.base.weight,
        }
        self.seen = [(module._parameters, tensor, _norm.content(tensor)) for module, tensor in owners.items()]

    def is_open(self, layer: Any) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or layer.training or layer._disable_adapters:
            return False
        base = self.base
        if (
            layer._modules["base_layer"] is not base
            or layer._active_adapter != self.active
            or layer.merged_adapters
            or layer.scaling[self.adapter] != self.scaling
            or self.folded is None
            or self.norm.folded is not self.folded
            or layer._norms.get(self.adapter) is not self.norm
            or base._forward_hooks
            or base._forward_pre_hooks
            or "forward" in base.__dict__
            or base.bias is not self.bias
            or choice.by_autograd()
            or _norm.is_checking()
        ):
            return False
        for parameters, tensor, content in self.seen:
            if parameters.get("weight") is not tensor or _norm.content(tensor) != content:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return linear.linear_eval(x, self.lora_A, *self.folded[:2], weight=self.weight, bias=self.bias)


class BaseProduct:
    """The base layer as a product, for the backward pass of a weight that is not at hand as a dense matrix."""

    def __init__(self, layer: Linear, bias: Tensor | None, args: Any, kwargs: Any) -> None:
        self.layer, self.bias, self.args, self.kwargs = layer, bias, args, kwargs

    def __call__(self, x: Tensor, index: Tensor | None) -> Tensor:
        """x W0^T without b, [..., len(index)] for these rows of W0, [..., out] where None."""
        weight = self.layer.base_weight()
        if index is not None and weight.has_rows:
            return F.linear(x, weight.rows(index).to(x.dtype))
        with torch.no_grad():
            out = self.layer.base_layer(x, *self.args, **self.kwargs)
        out = out if self.bias is None else out - self.bias
        return out if index is None else out[..., index]

    def stored(self) -> Any:
        return self.layer.base_weight().stored()


class Linear(DoraLayer, nn.Module):
    """DoRA on nn.Linear, transformers' Conv1D, and every quantised linear layer."""

    peft_layer = lora.Linear

    def adapt_fast(self, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.magnitude_only[adapter]:
            return super().adapt_fast(adapter, x, *args, **kwargs)
        weight = None if args or kwargs else self._dense_weight()
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        lora_A, lora_B = self.factor_parameters(adapter)
        bias = self._bias()
        base_out = None if weight is not None else self.base_layer(x, *args, **kwargs)
        if not self.training and not torch.is_grad_enabled():
            folded_B, c = _norm.folded(self, adapter)
            self._shortcut = None if weight is None else Shortcut(self, adapter, weight)
            return linear.linear_eval(x, lora_A, folded_B, c, weight=weight, bias=bias, base_out=base_out)

        direction = None
        if weight is not None and not p and linear.composes(x, weight):
            direction = _norm.direction(self, adapter)

        return linear.linear(
            x,
            lora_A,
            lora_B,
            self.scale(adapter, differentiable=True),
            self.scaling[adapter],
            weight=weight,
            bias=bias,
            base_out=base_out,
            base_product=None if base_out is None else BaseProduct(self, bias, args, kwargs),
            dropout_p=p,
            direction=direction,
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
        return linear.linear_operator(x, weight, self._bias(), *factors, c, self.scaling[adapter], p)

    def _dense_weight(self) -> Tensor | None:
        """W0 [out, in] where the base layer does nothing but multiply by it, so that our own product may stand for its
        forward: no subclass with a forward of its own, no hooks (offloading), no tensor subclass, nothing trained."""
        base: Any = self.base_layer
        forward = type(base).forward
        if forward is not nn.Linear.forward and forward is not Conv1D.forward:
            return None
        if "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks:
            return None
        if base._backward_hooks or base._backward_pre_hooks:
            return None
        weight = base.weight
        if type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad or not weight.is_floating_point():
            return None
        return weight.T if forward is Conv1D.forward else weight

    def _low_rank(self, adapter: str, x: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> Tensor:
        return functional.linear_branch(x, *self.factor_parameters(adapter), self.scaling[adapter])

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

    def _low_rank(self, adapter: str, x: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> Tensor:
        base = self.get_base_layer()
        if lora_A is None or lora_B is None:
            lora_A, lora_B = self.factor_parameters(adapter)
        return functional.embedding_branch(
            x,
            lora_A,
            lora_B,
            self.scaling[adapter],
            embed_scale=self._get_embed_scale(),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )

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

    def _low_rank(self, adapter: str, x: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> Tensor:
        if lora_A is None or lora_B is None:
            lora_A, lora_B = self.factor_parameters(adapter)
        return functional.conv_branch(x, lora_A, lora_B, self.scaling[adapter], self.get_base_layer())

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
