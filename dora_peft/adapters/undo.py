"""Taking back an operation that an error or Ctrl-C ended half-way.

Creating, loading, merging or deleting an adapter goes through the layers one by one. Every such operation runs inside
`restored_on_failure`, so that the model is as it was before unless the operation has succeeded. For as long the layers
share one buffer for the blocks of W0 that they read, see bases/scratch.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..bases import scratch
from ..layers import DoraLayer

_CONTAINERS = (dict, OrderedDict, list, set)


class Undo:
    """What a model was like when this was made; calling it makes the model so again.

    It holds the attributes of every module, config and accelerate hook, and the contents of the dicts, lists and sets
    among them: children, parameters, hooks, active and merged adapters. Tensors are held by reference. Whoever writes
    to one in place calls `remember` before.

    Args:
        model: The model.
        adapter_name: An adapter whose tensors may be overwritten, biases included; nothing happens if there is none.
        modules: Those that may be changed; all if None.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str | None = None, modules: list[nn.Module] | None = None
    ) -> None:
        modules = list(model.modules()) if modules is None else modules
        objects = [*modules, *_configs_and_hooks(modules)]
        self._attributes = [(vars(o), dict(vars(o))) for o in {id(o): o for o in objects}.values()]
        # Most are empty (every module has a dozen dicts of hooks), and copying these would take longest.
        held = [value for _, saved in self._attributes for value in saved.values() if type(value) in _CONTAINERS]
        self._empty = [value for value in held if not value]
        self._contents = [(value, value.copy()) for value in held if value]
        self._parameters = [(p, p.requires_grad, p.device) for p in model.parameters()]
        # the weights that unmerging would bring back, in another dtype if the model was cast since
        originals = [m._original[0] for m in modules if isinstance(m, DoraLayer) and m._original is not None]
        self._data = [(original, original.data) for original in originals]
        self._copies: list[tuple[Tensor, Tensor]] = []
        if adapter_name is not None:
            for parameter in [*_tensors_of(modules, adapter_name), *_biases(model)]:
                self.remember(parameter, parameter.detach().clone())

    def remember(self, parameter: Tensor, copy: Tensor) -> None:
        """Have a tensor that is about to be overwritten restored from `copy`, which may be on another device."""
        self._copies.append((parameter, copy))

    def adopt(self, other: Undo) -> None:
        """Restore what `other` remembers as well: the operation that made it was a part of this one."""
        self._copies += other._copies

    @torch.no_grad()
    def __call__(self) -> None:
        for attributes, saved in self._attributes:
            attributes.clear()
            attributes.update(saved)
        for container in self._empty:
            container.clear()
        for container, contents in self._contents:
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)
        for parameter, data in self._data:
            parameter.data = data
        # The first copy of a parameter is the oldest.
        for tensor, copy in reversed(self._copies):
            if tensor.dtype == copy.dtype and tensor.shape == copy.shape and not tensor.is_meta:
                tensor.copy_(copy)
            else:
                tensor.data = copy
        for parameter, requires_grad, device in self._parameters:
            if parameter.device != device:
                parameter.data = parameter.data.to(device)
            parameter.requires_grad_(requires_grad)


# The innermost operation that is going on.
_open: ContextVar[Undo | None] = ContextVar("open", default=None)


@contextmanager
def restored_on_failure(
    model: nn.Module,
    adapter_name: str | None = None,
    modules: list[nn.Module] | None = None,
    concerned: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Leave the model as it was if the body does not succeed, whatever ends it.

    Args:
        model: The model that the body changes.
        adapter_name, modules: See `Undo`.
        concerned: Asked after a failure: whether the body has changed anything that is ours.
    """
    undo, outer = Undo(model, adapter_name, modules), _open.get()
    token = _open.set(undo)
    try:
        with scratch.kept():
            yield
    except BaseException:
        if concerned():
            undo()
        raise
    finally:
        _open.reset(token)
    if outer is not None:
        outer.adopt(undo)


def remember(parameter: Tensor, copy: Tensor) -> None:
    """`Undo.remember` in the operation that is going on; nothing happens if there is none."""
    undo = _open.get()
    if undo is not None:
        undo.remember(parameter, copy)


def switched(model: nn.Module) -> list[nn.Module]:
    """The modules that a change of the active adapters writes to, a tenth of all; switching has to be quick."""
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return [model, *layers, *(base for layer in layers if (base := layer._modules.get("base_layer")) is not None)]


def _configs_and_hooks(modules: list[nn.Module]) -> list[object]:
    """Objects that modules hold and that operations write to: configs (replicated layers), accelerate's weights."""
    found: list[object] = []
    for module in modules:
        configs = vars(module).get("peft_config")
        hook = vars(module).get("_hf_hook")
        held = [vars(module).get("config"), hook, *getattr(hook, "hooks", ())]
        held += configs.values() if isinstance(configs, dict) else []
        found += [one for one in held if hasattr(one, "__dict__")]
    return found


def _tensors_of(modules: list[nn.Module], adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in adapted layers and in modules that are trained in full."""
    found: list[nn.Parameter] = []
    for module in modules:
        for name in getattr(module, "adapter_layer_names", ()):
            held = getattr(module, name, None)
            if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter_name in held:
                tensors = held[adapter_name]
                # a computed one (masks, parametrizations) is a tensor without a name of its own
                whole = held if isinstance(tensors, Tensor) else tensors
                found += [tensors] if isinstance(tensors, nn.Parameter) else whole.parameters()
    return found


def _biases(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
