"""v of all layers of a model in two launches, at the start of the model's forward pass, where a device has kernels.

`gather` puts two hooks on a model: the first has the device check and refresh v of all its layers from a table
(ops/kernels/grouped_norm.py), the second forgets what was not used. In between a layer takes its v instead of checking
by itself, once, and only if A, B, s and W0 are those of the table, unchanged as far as their addresses, layouts and
version counters tell, on the same stream, and in the same capture of a CUDA graph.

All else is checked in the layer (device.py), as ever: the first pass, and the pass after s or W0 changed; a layer
called alone, again, or once more by checkpointing in a backward pass; several active adapters; what cannot be read in
place; tensors lent for one call; replicas; and all layers of a model on which somebody else has hooks that run between
ours and a layer, sharding's among them: they may write past the version counter. What the model's own forward writes
to A or B in that way amid a pass is seen in the next one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops import choice, torch_names
from ..ops.constants import interpreted
from ..ops.content import version
from .adapted import AdaptedLayer
from .records import DeviceNorm, Norm, Stored

if TYPE_CHECKING:
    from ..ops.kernels.grouped_norm import Entry, Group

# Tables that may be made in a row for one pass each; then a model's layers check by themselves.
_PATIENCE = 8
# What the host sees of a tensor or of a layer.
_Key = tuple[object, ...]


class GroupedLayer(AdaptedLayer, Protocol):
    """What this file needs of a layer besides."""

    merged_adapters: list[str]
    _disable_adapters: bool
    _active_adapter: str | list[str]
    _modules: dict[str, nn.Module | None]

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]: ...


# One is made for each layer in each pass: a tuple takes a fifth of the time that a frozen dataclass does.
class _Value(NamedTuple):
    """v of one layer [out], on which stream it was computed (see `_place`), and from what: A and B as `_layout` says,
    and their version counters."""

    value: Tensor
    place: tuple[int, bool]
    device: DeviceNorm
    layout_A: _Key
    layout_B: _Key
    version_A: int
    version_B: int


@dataclass(slots=True)
class _Member:
    """A layer in a table.

    Attributes:
        lora_A, lora_B: As stored.
        norm, device: Its records, which are held so that their identity tells them from later ones.
        layout_A, layout_B: See `_layout`.
        group, place: Whose table, and which row of it.
    """

    lora_A: weakref.ref[Tensor]
    lora_B: weakref.ref[Tensor]
    norm: Norm
    device: DeviceNorm
    layout_A: _Key
    layout_B: _Key
    group: int = -1
    place: int = -1

    def known(self, value: Tensor, place: tuple[int, bool]) -> _Value | None:
        """v as the layer may take it, None if its factors have gone since the table was made."""
        lora_A, lora_B = self.lora_A(), self.lora_B()
        if lora_A is None or lora_B is None:
            return None
        return _Value(value, place, self.device, self.layout_A, self.layout_B, lora_A._version, lora_B._version)


class _Plan:
    """The tables for a model's layers as they are.

    Attributes:
        states: What `_state` gave for each layer, of which the tables were made.
        members: The layers in a table.
        uses: How many passes it has served.
    """

    def __init__(self, layers: Sequence[GroupedLayer], states: list[_Key | None]) -> None:
        self.states, self.uses = states, 0
        self.members: list[_Member] = []
        self.groups: list[Group] = []
        kernels = choice.grouped_norm_kernels()
        kinds: dict[object, list[tuple[_Member, Entry]]] = {}
        for layer, state in zip(layers, states, strict=True):
            if state is None:
                continue
            adapter = cast(str, state[0])
            norm = layer._norms[adapter]
            assert norm.device is not None
            lora_A, lora_B = factors = layer.factor_parameters(adapter)
            as_stored = all(map(lambda one, other: one is other, layer.as_matrices(*factors), factors))
            if not as_stored or not kernels.groupable(norm.device.stored, lora_A, lora_B):
                continue
            entry = kernels.Entry(
                norm.device.memory, norm.device.stored, lora_A.detach(), lora_B.detach(), float(norm.device.scaling)
            )
            member = _Member(
                weakref.ref(lora_A), weakref.ref(lora_B), norm, norm.device, _layout(lora_A), _layout(lora_B)
            )
            self.members.append(member)
            kinds.setdefault(kernels.kind(entry), []).append((member, entry))
        for entries in kinds.values():
            for place, (member, _) in enumerate(entries):
                member.group, member.place = len(self.groups), place
            self.groups.append(kernels.Group([entry for _, entry in entries]))

    def check(self) -> dict[int, _Value]:
        """v of every member, by its record's identity."""
        self.uses += 1
        places = [_place(group.device) for group in self.groups]
        values = [group.check(*place) for group, place in zip(self.groups, places, strict=True)]
        found = {}
        for member in self.members:
            known = member.known(values[member.group][member.place], places[member.group])
            if known is not None:
                found[id(member.norm)] = known
        return found


class _Pass:
    """What was gathered for one forward pass of one model in one thread."""

    def __init__(self, model: nn.Module, values: dict[int, _Value]) -> None:
        self.model, self.values = weakref.ref(model), values


class _Here(threading.local):
    """The forward passes that are going on in a thread, the innermost last."""

    def __init__(self) -> None:
        self.passes: list[_Pass] = []


_here = _Here()


class _Model:
    """What is known of a model between its forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.lock = threading.Lock()
        # a captured graph reads their tables
        self.captured: list[_Plan] = []
        self.look_at(model)

    def look_at(self, model: nn.Module) -> None:
        """Find the layers of the model, and forget their tables."""
        self.plan: _Plan | None = None
        self.wasted = 0
        names = [name for name, module in model.named_modules() if _is_layer(module)]
        modules = dict(model.named_modules())
        self.layers = [weakref.ref(modules[name]) for name in names]
        # modules whose hooks run between those of the model and a layer's own check
        between = {name.rsplit(".", up)[0] for name in names for up in range(name.count(".") + 1)} - {""}
        own = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")
        inside = {f"{name}.{part}.{adapter}" for name in names for part in own for adapter in modules[name].r}
        between |= inside | {f"{name}.base_layer" for name in names}
        self.hooks = [
            hooks
            for name in sorted(between & modules.keys())
            for hooks in (modules[name]._forward_pre_hooks, modules[name]._forward_hooks)
        ]

    def gathered(self, model: nn.Module) -> _Pass | None:
        """v of all layers that the device can tell about at once, None if there are none."""
        layers = [layer for reference in self.layers if (layer := reference()) is not None]
        first = None if not layers else next(iter(cast(nn.Module, layers[0]).parameters()), None)
        if first is None or not choice.uses_kernels(first.device, torch.float32) or self._watched(model):
            return None
        states = [_state(cast(GroupedLayer, layer)) for layer in layers]
        plan = self.plan
        capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
        if plan is None or plan.states != states:
            # a table cannot be brought to the device amid a capture
            if capturing or self.wasted >= _PATIENCE:
                return None
            if plan is not None and plan.groups:
                self.wasted = self.wasted + 1 if plan.uses < 2 else 0
            plan = self.plan = _Plan([cast(GroupedLayer, layer) for layer in layers], states)
        if not plan.groups:
            return None
        if capturing and plan not in self.captured:
            self.captured.append(plan)
        return _Pass(model, plan.check())

    def _watched(self, model: nn.Module) -> bool:
        """Whether others' hooks run between ours and a layer's own check."""
        if torch_module._global_forward_pre_hooks or torch_module._global_forward_hooks or any(self.hooks):
            return True
        return next(reversed(model._forward_pre_hooks.values()), None) is not _begin


_models: weakref.WeakKeyDictionary[nn.Module, _Model] = weakref.WeakKeyDictionary()


def gather(model: nn.Module) -> None:
    """Check the norms of all layers of `model` together from now on, where a device has kernels.

    Called again when its layers have changed. On a machine without kernels nothing happens.
    """
    known = _models.get(model)
    if known is not None:
        known.look_at(model)
    if not (torch.cuda.is_available() or interpreted()) or _begin in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(_begin)
    # after an exception as well
    model.register_forward_hook(_end, always_call=True)


def scatter(model: nn.Module) -> None:
    """Undo `gather`, when the layers have gone."""
    known = _models.get(model)
    if known is not None:
        known.look_at(model)
    for hooks, ours in ((model._forward_pre_hooks, _begin), (model._forward_hooks, _end)):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)


# Functions of this file, so that a copied or unpickled model has them as well.


def _begin(model: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling() or choice.computes_densely() or getattr(model, "_is_replica", False):
        return
    passes = _here.passes
    # of this model, whose pass was interrupted, or calls the model itself: its layers go on by themselves
    passes[:] = [one for one in passes if one.model() not in (None, model)]
    known = _models.get(model)
    if known is None:
        known = _models[model] = _Model(model)
    with known.lock, torch.inference_mode(False), torch.no_grad():
        found = known.gathered(model)
    if found is not None:
        passes.append(found)


def _end(model: nn.Module, args: object, out: object) -> None:
    if not torch.compiler.is_compiling():
        _here.passes[:] = [one for one in _here.passes if one.model() not in (None, model)]


def take(norm: Norm, lora_A: Tensor, lora_B: Tensor, scaling: float, stored: Stored) -> Tensor | None:
    """v [out] that was gathered for this pass of the model, None if the layer has to check by itself.

    Args:
        norm: The adapter's record.
        lora_A, lora_B, scaling, stored: What v has to belong to, all as stored in the layer.
    """
    if not _here.passes:
        return None
    # once: a layer's second call may come after anything
    found = _here.passes[-1].values.pop(id(norm), None)
    if found is None or found.device is not norm.device or found.place != _place(found.value.device):
        return None
    device = found.device
    if device.scaling != scaling or device.weight() is not stored or not isinstance(stored, Tensor):
        return None
    if stored.data_ptr() != device.address or version(stored) != device.version:
        return None
    if lora_A._version != found.version_A or lora_B._version != found.version_B:
        return None
    return found.value if _layout(lora_A) == found.layout_A and _layout(lora_B) == found.layout_B else None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_norms", None), dict) and hasattr(module, "lora_magnitude_vector")


def _state(layer: GroupedLayer) -> _Key | None:
    """The adapter, A, B and the records of a layer that may be in a table; None for one that has to check by itself.

    Its device has computed v before, and s and W0 are what they were.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    modules, active = layer._modules, layer._active_adapter
    present = cast(nn.Module, modules["lora_magnitude_vector"])._modules
    adapters = [active] if type(active) is str else list(active)
    if len(adapters) != 1 or adapters[0] not in present:
        adapters = [name for name in adapters if name in present]
    # a scaling that is a tensor would have to be waited for
    scaling = layer.scaling[adapters[0]] if len(adapters) == 1 else None
    norm = None if scaling is None or isinstance(scaling, Tensor) else layer._norms.get(adapters[0])
    device = None if norm is None else norm.device
    if norm is None or device is None or device.scaling != scaling:
        return None
    stored = layer.original_weight()
    if device.weight() is not stored or not isinstance(stored, Tensor):
        return None
    if device.version is None or device.version != version(stored) or device.address != stored.data_ptr():
        return None
    factors = [_parameter(holder, adapters[0]) for holder in layer.factor_modules(adapters[0])]
    if any(type(factor) is not nn.Parameter or factor.is_inference() for factor in factors):
        return None
    return adapters[0], *map(_layout, cast(list[Tensor], factors)), id(norm), id(device)


def _parameter(holder: nn.Module, adapter: str) -> nn.Parameter | None:
    """A or B as a parameter of what holds it, None if it is computed (masks, parametrizations); computes nothing."""
    return holder._parameters.get(adapter if isinstance(holder, nn.ParameterDict) else "weight")


def _layout(tensor: Tensor) -> _Key:
    """Where a tensor lies, and how."""
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _place(device: torch.device) -> tuple[int, bool]:
    """The stream that launches go to, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    # asked by every layer, and the public functions make an object for each answer
    return torch_names.raw_stream(device.index), torch.cuda.is_current_stream_capturing()
