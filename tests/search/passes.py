"""Operations that run the model otherwise: checkpoints, autocast, compiled, and several passes in one loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from edits import change, edited, exchange, multiply_factor, new_base, plain_layer, set_factor
from operations import Op, Skip, look, look_gradients, operation, unmerged
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from world import World, quiet


def several_passes(
    world: World, op: Op, where: str, between: Callable[[], Any] | None = None, after: Callable[[], Any] | None = None
) -> None:
    """Two forward passes, something between them, and one backward pass."""
    world.model.train()
    world.clear()
    inputs = [world.input(), world.input()]
    first = world.forward(inputs[0], op.consumer)
    if between is not None:
        between()
    try:
        second = world.forward(inputs[1], op.consumer)
    finally:
        if after is not None:
            after()
    outputs, runs = zip(first, second, strict=True)
    world.step_loss(list(outputs), list(runs))
    world.compare(list(outputs), list(runs), inputs, where)


@operation()
def two_scales(world: World, op: Op) -> None:
    """Two passes at different scales of the adapters (slider training)."""
    factor = (-1.0, 0.5, 2.0)[op.a % 3]
    if op.b % 2:
        manager = rescale_adapter_scale(world.model, factor)

        def rescale() -> None:
            manager.__enter__()
            multiply_factor(world, factor)

        def restore() -> None:
            manager.__exit__(None, None, None)
            multiply_factor(world, 1 / factor)

    else:
        before = {name: known.factor for name, known in world.adapters.items()}

        def rescale() -> None:
            for name in world.active:
                set_factor(world, name, factor)

        def restore() -> None:
            for name in world.active:
                set_factor(world, name, before[name])

    several_passes(world, op, "two scales in one loss", rescale, restore)
    look(world, op, "after two scales")


@operation()
def exchange_W0_in_flight(world: World, op: Op) -> None:
    """The base weight is exchanged between two passes of one loss."""
    unmerged(world)
    layer = plain_layer(world, op)
    value = new_base(world, layer, op.a)

    def replace() -> None:
        for name in exchange(world, layer, value):
            world.weights[name] = value.clone()

    several_passes(world, op, "base weight exchanged in flight", replace)


@operation()
def functional_call(world: World, op: Op) -> None:
    """One or two passes with other parameters in place of the model's own."""
    unmerged(world)
    look(world, op, "before functional_call")
    world.model.train()
    world.clear()
    names = {id(p): name for name, p in world.model.named_parameters()}
    runs, outputs, inputs, leaves = [], [], [], []
    for i in range(1 + op.a % 2):
        others = {k: edited(p.detach(), op.a + i).requires_grad_() for k, p in world.trained().items()}
        arguments = {names[id(p)]: others[key] for key, p in world.trained().items()}
        x = world.input()
        y, run = world.forward(
            x,
            op.consumer,
            lambda x, given=arguments: torch.func.functional_call(world.model, given, (x,)),
            {key: tensor.detach().clone() for key, tensor in others.items()},
        )
        runs, outputs, inputs, leaves = [*runs, run], [*outputs, y], [*inputs, x], [*leaves, others]
    world.step_loss(outputs, runs)
    for y, run, x, others in zip(outputs, runs, inputs, leaves, strict=True):
        gradients = {".".join(key): tensor.grad for key, tensor in others.items()}
        world.compare([y], [run], [x], f"functional_call, {len(runs)} at a time", gradients=gradients)
    look(world, op, "after functional_call")


@operation()
def checkpointing(world: World, op: Op) -> None:
    """Recompute in backward; two graphs are in flight at a time."""
    kind = "reentrant" if op.a % 2 else "non-reentrant"
    world.net.checkpointing = kind
    try:
        if op.a % 3:
            look_gradients(world, op, f"{kind} checkpoint")
        else:
            several_passes(world, op, f"{kind} checkpoint, two graphs")
    finally:
        world.net.checkpointing = None


@operation()
def autocast(world: World, op: Op) -> None:
    if world.dtype is torch.float64:
        raise Skip

    def lowered(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return world.model(x)

    if op.a % 3:
        look_gradients(world, op, "autocast", call=lowered, autocast=True)
    else:
        world.model.eval()
        with torch.no_grad():
            y, run = world.forward(world.input(), op.consumer, lowered)
            world.compare_output(y, run, "autocast in evaluation", autocast=True)


@operation(3)
def compiled(world: World, op: Op) -> None:
    """Compile, edit, and call again."""
    op = Op(op.name, quiet(op.consumer), op.a, op.b)
    torch._dynamo.reset()
    call = torch.compile(world.model if op.a % 2 else world.net, backend="eager")
    try:
        for where in ("compiled", "compiled, after an edit"):
            if op.b % 2:
                look_gradients(world, op, where, call=call)
            else:
                world.model.eval()
                with torch.no_grad():
                    y, run = world.forward(world.input(), op.consumer, call)
                    world.compare_output(y, run, where)
            change(list(world.trained().values())[op.a % 3 :: 3], op.a, op.b)
            # every second one has another number of dimensions, and would be compiled anew
            next(world.inputs)
    except NotImplementedError as error:
        # the norm's gradient of a grouped convolution
        if world.spec.shape != "grouped" or "detach_norm" not in str(error):
            raise
    finally:
        torch._dynamo.reset()


@operation(4)
def traced(world: World, op: Op) -> None:
    """torch.jit.trace or torch.export of a model that may have run or not, in evaluation, called on other inputs."""
    op = Op(op.name, quiet(op.consumer), op.a, op.b)
    world.model.eval()
    world.net.consumer = op.consumer
    x = world.input().detach()
    with torch.no_grad():
        if op.a % 2:
            call = torch.jit.trace(world.net, x)
        else:
            call = torch.export.export(world.net, (x,)).module()
        other = models.example(world.spec, world.dtype, op.a % 2)[: len(x)]
        y, run = world.forward(x if other.shape != x.shape else other, op.consumer, call)
        world.compare_output(y, run, "traced" if op.a % 2 else "exported")
