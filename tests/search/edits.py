"""Operations that edit A, B, m, W0 or the scaling, most of them behind the package's back."""

from __future__ import annotations

import models
import torch
from operations import Op, look, operation, unmerged
from torch import Tensor, nn
from world import World


def edited(value: Tensor, a: int) -> Tensor:
    """Other numbers of the same size."""
    kinds = ("random", "negated", "scaled", "rolled", "swapped")
    kind = kinds[a % len(kinds)] if value.any() else "random"
    if kind == "negated":
        return -value
    if kind == "scaled":
        return value * 1.5
    if kind == "rolled":
        return value.roll(1, 0)
    # two elements
    if kind == "swapped":
        flat = value.flatten().clone()
        flat[[0, -1]] = flat[[-1, 0]]
        return flat.view(value.shape)
    size = value.double().square().mean().sqrt().item() or 1.0
    return (torch.randn(value.shape, generator=models.generator(a)) * size).to(value.dtype)


def put(parameter: Tensor, value: Tensor, b: int) -> None:
    """Write `value` into a parameter on one of four ways, three of which no version counter tells."""
    if b % 4 == 0:
        parameter.data.copy_(value)
    elif b % 4 == 1:
        parameter.data.mul_(0).add_(value)
    elif b % 4 == 2:
        parameter.data = value.clone()
    else:
        with torch.no_grad():
            parameter.copy_(value)


def change(parameters: list[nn.Parameter], a: int, b: int) -> None:
    for parameter in parameters:
        put(parameter, edited(parameter.detach().clone(), a), b)


def edit(world: World, op: Op, letter: str) -> None:
    """Edit one kind of tensor in all layers of one adapter, active or not."""
    names = list(world.adapters)
    look(world, op, f"before an edit of {letter}")
    name = names[op.a % len(names)]
    change([p for key, p in world.parameters([name]).items() if key[2] == letter], op.a, op.b // 4)
    look(world, op, f"edited {letter}")


@operation()
def edit_A(world: World, op: Op) -> None:
    edit(world, op, "A")


@operation()
def edit_B(world: World, op: Op) -> None:
    edit(world, op, "B")


@operation()
def edit_m(world: World, op: Op) -> None:
    edit(world, op, "m")


def new_base(world: World, layer: str, a: int) -> Tensor:
    """Other numbers in all of W0; what was zero stays zero."""
    weight = world.weights[layer]
    return weight * (1 + 0.5 * torch.randn(weight.shape, generator=models.generator(a))).to(weight.dtype)


def plain_layer(world: World, op: Op) -> str:
    """A layer whose weight is a parameter."""
    names = [name for name in world.weights if isinstance(world.original(name), nn.Parameter)]
    return names[op.a % len(names)]


@operation()
def edit_W0(world: World, op: Op) -> None:
    """The whole of one base weight, through .data or as another parameter."""
    unmerged(world)
    layer = plain_layer(world, op)
    look(world, op, "before an edit of W0")
    old, value = world.original(layer), new_base(world, layer, op.a)
    sharing = [name for name in world.weights if world.original(name) is old]
    if op.a % 3:
        put(old, value, op.b // 4)
    else:
        sharing = exchange(world, layer, value)
    for name in sharing:
        world.weights[name] = value.clone()
    look(world, op, "edited W0")


def exchange(world: World, layer: str, value: Tensor) -> list[str]:
    """Give the layer another weight parameter; the names of the layers that have it."""
    module = world.base_module(layer)
    module.weight = nn.Parameter(value.clone(), requires_grad=False)
    return [name for name in world.weights if world.original(name) is module.weight]


def multiply_factor(world: World, factor: float) -> None:
    for name in world.adapters:
        world.adapters[name].factor *= factor


def set_factor(world: World, adapter: str, factor: float) -> None:
    """The adapter's scaling as a multiple of its initial one."""
    known = world.adapters[adapter]
    for layer in known.layers:
        world.dora(layer).set_scale(adapter, factor)
    known.factor = factor


@operation()
def set_scale(world: World, op: Op) -> None:
    unmerged(world)
    look(world, op, "before set_scale")
    set_factor(world, world.active[op.a % len(world.active)], (0.5, -1.0, 2.0, 1.0)[op.a % 4])
    look(world, op, "set_scale")


@operation()
def ema_swap(world: World, op: Op) -> None:
    """Averaged weights are copied or swapped in through .data, evaluated, and the trained ones restored."""
    look(world, op, "before an EMA swap")
    parameters = list(world.trained().values())
    shadow = [(p.detach() * 0.7).clone() for p in parameters]
    stored = [p.detach().clone() for p in parameters]

    def put(values: list[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            if op.a % 2:
                parameter.data = value
            else:
                parameter.data.copy_(value)

    put(shadow)
    look(world, op, "EMA weights")
    put(stored)
    look(world, op, "after an EMA swap")
