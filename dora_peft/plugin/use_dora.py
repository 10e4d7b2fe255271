"""The fast forward and backward for models built with PEFT's own `LoraConfig(use_dora=True)`.

A framework that builds the adapter itself (TRL, LLaMA-Factory, Axolotl, diffusers' scripts) keeps doing so; modules,
parameters and checkpoints stay PEFT's. Only `forward` of PEFT's LoRA layers goes through this package where their one
active adapter is DoRA.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import Tensor, nn

from .. import norms
from ..bases import unpack_for_gradient
from ..layers.kinds import Embedding, Linear, _ConvNd
from ..layers.layer import DoraLayer
from ..norms import ties
from ..ops import choice
from ..ops.kept_output import Outputs, Report

_DROPOUT_MODES = ("peft", "branch")
_state: str | None = None  # the dropout mode while on
_originals: list[tuple[Any, str, Any]] = []
_warned: set[str] = set()
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

    def __exit__(self, *_: Any) -> None:
        self.undo()


def _switch(mode: str | None) -> None:
    global _state
    _state = mode
    if mode is not None and not _originals:
        for cls in _peft_classes():
            _replace(cls, "forward", _forward)
        for variant in (variants.DoraLinearVariant, variants.DoraEmbeddingVariant, variants._DoraConvNdVariant):
            _replace(variant, "forward", _warn_and_forward)
    elif mode is None:
        while _originals:
            owner, name, original = _originals.pop()
            setattr(owner, name, original)
        norms.views.clear()
        _warned.clear()


def _peft_classes() -> list[Any]:
    classes: list[Any] = [lora.Linear, lora.Embedding, lora.layer._ConvNd]
    for name in ("Linear8bitLt", "Linear4bit"):  # where bitsandbytes is installed
        cls = getattr(lora, name, None) or getattr(lora.bnb, name, None)
        if cls is not None:
            classes.append(cls)
    return classes


def _replace(owner: Any, name: str, make: Any) -> None:
    original = owner.__dict__[name]
    _originals.append((owner, name, original))
    new = make(getattr(owner, name))
    setattr(owner, name, staticmethod(new) if isinstance(original, staticmethod) else new)


def _forward(original: Any) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.compiler.is_compiling() or _obstacle(self) is not None:
            return original(self, x, *args, **kwargs)
        view = norms.views.get(self)
        if view is None:
            view = norms.views[self] = _VIEWS[_kind(self)](self)
        adapter = self.active_adapters[0]
        unpack_for_gradient(self.get_base_layer(), x, self.training)
        shortcut = view._shortcut
        if shortcut is not None and shortcut.is_open(view):
            return shortcut(x, view)
        if view._drops_base(adapter) or view._needs_autograd():
            return view.adapt_plainly([adapter], x)
        return view.adapt_fast(adapter, x)

    return forward


def _warn_and_forward(original: Any) -> Any:
    """Around PEFT's DoRA itself: whatever arrives here was not taken over."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
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


_DORA_VARIANTS = (variants.DoraLinearVariant, variants.DoraEmbeddingVariant, variants._DoraConvNdVariant)


def _kind(module: Any) -> str:
    if isinstance(module, lora.Embedding):
        return "embedding"
    return "conv" if isinstance(module, lora.layer._ConvNd) else "linear"


def _obstacle(module: Any) -> str | None:
    """Why PEFT has to compute this layer now; None where this package can."""
    known: Any = tuple(_peft_classes())
    if not isinstance(module, known):
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
    return None


class _Always(dict[str, Any]):
    """The same value for every adapter."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, _: str) -> Any:
        return self.value


class _View:
    """One of PEFT's layers with the interface of a DoraLayer: its modules and parameters, our norm and formulas."""

    magnitude_only = _Always(False)
    detach_norm = _Always(True)
    _original = None

    get_base_layer = DoraLayer.get_base_layer
    original_weight = DoraLayer.original_weight
    base_weight = DoraLayer.base_weight
    factor_parameters: Any = DoraLayer.factor_parameters
    factors = DoraLayer.factors
    as_matrices: Any = DoraLayer.as_matrices
    magnitude = DoraLayer.magnitude
    scale = DoraLayer.scale
    base_weight_of = DoraLayer.base_weight_of
    held_weight = DoraLayer.held_weight
    _tied = DoraLayer._tied
    _dense_norm = DoraLayer._dense_norm
    _wide_matrix = DoraLayer._wide_matrix
    _as_matrix: Any = DoraLayer._as_matrix
    _drops_base: Any = DoraLayer._drops_base
    _dropped: Any = DoraLayer._dropped
    adapt: Any = DoraLayer.adapt
    adapt_plainly: Any = DoraLayer.adapt_plainly
    adapt_fast: Any = DoraLayer.adapt_fast
    _needs_autograd: Any = DoraLayer._needs_autograd
    _own_forward: Any = DoraLayer._own_forward
    _without_bias: Any = DoraLayer._without_bias
    _base_output: Any = DoraLayer._base_output
    _base_product: Any = DoraLayer._base_product
    _pinned_product: Any = DoraLayer._pinned_product
    _dense_weight: Any = DoraLayer._dense_weight
    _multiplies: Any = DoraLayer._multiplies
    _oriented: Any = DoraLayer._oriented
    _multiply: Any = DoraLayer._multiply
    _bias = DoraLayer._bias
    _per_channel: Any = DoraLayer._per_channel

    def __init__(self, module: Any) -> None:
        self.module = weakref.ref(module)  # the table of views must not keep the layer alive
        self._norms: dict[str, norms.Norm] = {}
        self._base_norm = self._seam = self._shortcut = None
        self.name = f"{type(module).__name__}({', '.join(map(str, module.base_layer.weight.shape))})"
        self._outputs = Outputs(self.name, _report)
        self.number = norms.register(self)

    def initial_scaling(self, adapter: str) -> float:
        """s as PEFT's layer has it."""
        return float(self.scaling[adapter])

    def settle_late(self, adapter: str) -> None:
        """As `DoraLayer.settle_late`; PEFT's m stays 0 on a zero row of W0, whatever B has become there."""
        DoraLayer.settle_late(self, adapter)  # type: ignore[arg-type]
        zero = ties.zero_rows(self)
        if zero is not None and bool(zero.any()):
            own: Any = self
            norm, magnitude = self._norms[adapter], own.magnitude(adapter).detach().view(-1)
            tied = zero & (magnitude == 0).to(zero.device)
            tied = tied if norm.tied is None else tied | norm.tied.to(zero.device)
            norm.tied = tied if bool(tied.any()) else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module(), name)

    @property
    def dropout_mode(self) -> _Always:
        return _Always("branch" if _state == "branch" else "paper")


class _LinearView(_View):
    adapt_fast = Linear.adapt_fast
    _own_forward = Linear._own_forward
    _multiplies = Linear._multiplies
    _oriented = Linear._oriented
    _multiply = Linear._multiply
    _as_matrix = Linear._as_matrix
    _low_rank = Linear._low_rank


class _EmbeddingView(_View):
    factor_parameters = Embedding.factor_parameters
    _drops_base = Embedding._drops_base
    _dropped = Embedding._dropped
    _as_matrix = Embedding._as_matrix
    _multiplies = Embedding._multiplies
    _multiply = Embedding._multiply
    _low_rank = Embedding._low_rank


class _ConvView(_View):
    as_matrices = _ConvNd.as_matrices
    _multiplies = _ConvNd._multiplies
    _multiply = _ConvNd._multiply
    _as_matrix = _ConvNd._as_matrix
    _low_rank = _ConvNd._low_rank
    _per_channel = _ConvNd._per_channel


_VIEWS = {"linear": _LinearView, "embedding": _EmbeddingView, "conv": _ConvView}
