"""The fast forward and backward for models built with PEFT's own `LoraConfig(use_dora=True)`.

A framework that builds the adapter itself (TRL, LLaMA-Factory, Axolotl, diffusers' scripts) keeps doing so; modules,
parameters and checkpoints stay PEFT's. Only `forward` of PEFT's LoRA layers goes through this package, if their one
active adapter is DoRA.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import Tensor, nn

from .. import norms
from ..bases import BaseWeight, base_weight, unpack_for_gradient
from ..bases.inspection import stored_weight
from ..bases.offload import at_hand
from ..layers import called
from ..layers.conv import ConvKind
from ..layers.embedding import EmbeddingKind
from ..layers.forward import adapt_keeping_output, adapt_plainly, drops_base, may_differ_again
from ..layers.kind import Kind
from ..layers.linear import LinearKind, adapt_linear
from ..layers.shortcut import Shortcut
from ..norms import ties
from ..ops import choice
from ..ops.overwritten import Outputs, Report
from .patching import patch, unpatch

if TYPE_CHECKING:

    class PeftLayer(nn.Module, lora.LoraLayer):
        """One of PEFT's LoRA layers, all of which derive from both."""


_DROPOUT_MODES = ("peft", "branch")
# The dropout mode, None while off.
_state: str | None = None
_warned: set[str] = set()
# A forward method, or PEFT's function in the place of one.
Forward = Callable[..., Tensor]
_DORA_VARIANTS = (variants.DoraLinearVariant, variants.DoraEmbeddingVariant, variants._DoraConvNdVariant)
_report = Report()


class accelerate_use_dora:
    """Let layers of `LoraConfig(use_dora=True)`, existing and future ones, compute by this package.

        dora_peft.accelerate_use_dora()            # until undo() of the returned object
        with dora_peft.accelerate_use_dora(): ...

    Results are PEFT's up to rounding; rows of W0 that are 0, where PEFT gives NaN, train as plain LoRA, and over a bf16
    base A and B take part in bf16. What cannot be taken over computes as before, with a warning that says what and why:
    several active adapters, grouped convolutions, layers of other classes, torch.compile.

    Args:
        dropout_mode: "peft" keeps PEFT's dropout, which also drops the part of the base product that DoRA adds and
            costs a second base product; "branch" drops the low-rank branch only, as LoRA does.

    Raises:
        ValueError: Another dropout_mode.
    """

    def __init__(self, dropout_mode: str = "peft") -> None:
        if dropout_mode not in _DROPOUT_MODES:
            raise ValueError(f"dropout_mode must be 'peft' or 'branch', found {dropout_mode!r}.")
        self._before: str | None = _state
        self._done = False
        _switch(dropout_mode)

    def undo(self) -> None:
        """Give the layers back to what computed them before; a second call does nothing."""
        if not self._done:
            self._done = True
            _switch(self._before)

    def __enter__(self) -> accelerate_use_dora:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _switch(mode: str | None) -> None:
    global _state
    _state = mode
    for owners, make in ((_peft_classes(), _forward), (_DORA_VARIANTS, _warn_and_forward)):
        for owner in owners:
            if mode is None:
                unpatch(owner, "forward")
            else:
                patch(owner, "forward", make)
    if mode is None:
        norms.views.clear()
        _warned.clear()


def _peft_classes() -> list[type]:
    # the last two are there if bitsandbytes is installed
    quantised = [getattr(lora, n, None) or getattr(lora.bnb, n, None) for n in ("Linear8bitLt", "Linear4bit")]
    return [lora.Linear, lora.Embedding, lora.layer._ConvNd, *(cls for cls in quantised if cls is not None)]


def _forward(original: Forward) -> Forward:
    def forward(self: PeftLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args or kwargs or torch.compiler.is_compiling():
            return original(self, x, *args, **kwargs)
        view = norms.views.get(self)
        # read once: another thread may replace it
        shortcut = view._shortcut if isinstance(view, View) else None
        if shortcut is not None and isinstance(view, View):
            y = shortcut(view, self, x)
            if y is not None:
                return y
        if _obstacle(self) is not None:
            return original(self, x)
        if not isinstance(view, View):
            view = norms.views[self] = View(self)
        return _adapted(view, self, self.active_adapters[0], x)

    return forward


def _adapted(view: View, module: PeftLayer, adapter: str, x: Tensor) -> Tensor:
    unpack_for_gradient(view.get_base_layer(), x, module.training)
    how = choice.decide(x.device, x.dtype)
    if how == "dense" or drops_base(view, adapter) or may_differ_again(view):
        return adapt_plainly(view, [adapter], how, x, (), {})
    if isinstance(view.kind, LinearKind):
        y, view._shortcut = adapt_linear(view, module, adapter, how, x, (), {})
        return y
    return adapt_keeping_output(view, adapter, how, x, (), {})


def _warn_and_forward(original: Forward) -> Forward:
    """Around PEFT's DoRA itself: whatever arrives here was not taken over."""

    def forward(module: PeftLayer, *args: object, **kwargs: object) -> Tensor:
        if not torch.compiler.is_compiling():
            reason = _obstacle(module) or "it is called with options such as adapter_names"
            message = f"{type(module).__module__}.{type(module).__name__}: {reason}"
            if message not in _warned:
                _warned.add(message)
                warnings.warn(
                    f"accelerate_use_dora leaves these DoRA layers to PEFT: {message}.", UserWarning, stacklevel=2
                )
        return original(module, *args, **kwargs)

    return forward


def _kind(module: PeftLayer) -> Kind:
    if isinstance(module, lora.Embedding):
        return EmbeddingKind()
    return ConvKind() if isinstance(module, lora.layer._ConvNd) else LinearKind()


def _factor_modules(module: PeftLayer, adapter: str) -> tuple[nn.Module, nn.Module]:
    """What holds A and B."""
    if isinstance(module, lora.Embedding):
        return module.lora_embedding_A, module.lora_embedding_B
    return module.lora_A[adapter], module.lora_B[adapter]


def _obstacle(module: PeftLayer) -> str | None:
    """Why PEFT has to compute this layer now; None if this package can."""
    if not isinstance(module, tuple(_peft_classes())):
        return "a class that this package does not know"
    if module.disable_adapters or module.merged:
        return "its adapters are disabled or merged"
    active = module.active_adapters
    if len(active) != 1:
        return "it has several active adapters"
    if not isinstance(module.lora_variant.get(active[0]), _DORA_VARIANTS):
        return "its adapter is not DoRA"
    base = module.get_base_layer()
    if getattr(base, "groups", 1) > 1:
        return "a grouped convolution, whose norm PEFT defines otherwise"
    if getattr(module, "fan_in_fan_out", False) and isinstance(base, nn.Linear):
        return "fan_in_fan_out on nn.Linear"
    if any(getattr(module, "lora_bias", {}).values()):
        return "lora_bias"
    if choice.transforming():
        return "a torch.func transform"
    holder, dropout = module.lora_magnitude_vector[active[0]], module.lora_dropout[active[0]]
    if called.are_called(_factor_modules(module, active[0]), holder, dropout, module.training):
        return "hooks, masks or parametrizations on its factors or dropout"
    return None


T = TypeVar("T")


class _Always(dict[str, T]):
    """The same value for every adapter."""

    def __init__(self, value: T) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, _: str) -> T:
        return self.value

    def get(self, _: str, default: object = None) -> T:  # type: ignore[override]
        return self.value


class View:
    """One of PEFT's layers as the norms and formulas of this package see it: its modules and parameters, our records.

    Attributes:
        kind: How it computes.
    """

    magnitude_only = _Always(False)
    detach_norm = _Always(True)

    def __init__(self, module: PeftLayer) -> None:
        # the table of views must not keep the layer alive
        self._module = weakref.ref(module)
        self.kind = _kind(module)
        self._norms: dict[str, norms.Norm] = {}
        self._base_norm: norms.BaseNorm | None = None
        self._shortcut: Shortcut | None = None
        shape = getattr(module.base_layer, "weight", torch.empty(0)).shape
        self.name = f"{type(module).__name__}({', '.join(map(str, shape))})"
        self._outputs = Outputs(self.name, _report)
        self.number = norms.register(self)

    @property
    def module(self) -> PeftLayer:
        """PEFT's layer."""
        module = self._module()
        assert module is not None, "a view is used by its own layer alone"
        return module

    @property
    def base_layer(self) -> nn.Module:
        return self.module.base_layer

    @property
    def scaling(self) -> Mapping[str, float]:
        return self.module.scaling

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        return self.module.lora_dropout

    @property
    def lora_magnitude_vector(self) -> nn.ModuleDict:
        return self.module.lora_magnitude_vector

    @property
    def dropout_mode(self) -> Mapping[str, str]:
        return _Always("branch" if _state == "branch" else "paper")

    def get_base_layer(self) -> nn.Module:
        return self.module.get_base_layer()

    def original_weight(self) -> norms.Stored:
        return stored_weight(self.get_base_layer())

    def base_weight(self, weight: Tensor | None = None) -> BaseWeight:
        return base_weight(self.get_base_layer(), self.name, weight)

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]:
        return _factor_modules(self.module, adapter)

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.module._cast_input_dtype(x, dtype)

    def factor_parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        module = self.module
        if isinstance(module, lora.Embedding):
            return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        # no parameters in FSDP, in replicas and under functional_call
        return cast(nn.Parameter, module.lora_A[adapter].weight), cast(nn.Parameter, module.lora_B[adapter].weight)

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.kind.as_matrices(self.get_base_layer(), lora_A, lora_B)

    def magnitude(self, adapter: str) -> nn.Parameter:
        return cast(nn.Parameter, self.module.lora_magnitude_vector[adapter].weight)

    def initial_scaling(self, adapter: str) -> float:
        """s as PEFT's layer has it."""
        return float(self.scaling[adapter])

    def _get_embed_scale(self) -> Tensor | float | None:
        return self.module._get_embed_scale()

    def settle_late(self, adapter: str) -> None:
        """Find out which rows are tied; PEFT's m stays 0 on a zero row of W0, whatever B has become there."""
        with at_hand(self.get_base_layer()):
            tied = ties.settle_late(self, adapter)
            zero = ties.zero_rows(self)
        if zero is not None and bool(zero.any()):
            never = zero & (self.magnitude(adapter).detach().view(-1) == 0).to(zero.device)
            tied = never if tied is None else never | tied.to(zero.device)
            norms.settle_as(self, adapter, tied if bool(tied.any()) else None)
