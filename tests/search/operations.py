"""The operations of a sequence: what they have in common, evaluation and training.

Edits are in edits.py, passes of other kinds (checkpoints, autocast, several in one loss) in passes.py, and what changes
which adapters there are or where the weights live in lifecycle.py. Each operation compares outputs, and gradients where
there are any, with the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from world import Disagreement, World, same_bits


@dataclass(frozen=True)
class Op:
    """One operation; what `a` and `b` choose is the operation's own affair."""

    name: str
    consumer: str = "silu"
    a: int = 0
    b: int = 0


class Skip(Exception):
    """The operation means nothing in this state."""


OPERATIONS: dict[str, Callable[[World, Op], None]] = {}
# how often each is drawn
WEIGHTS: dict[str, int] = {}


def operation(weight: int = 12) -> Callable[[Callable[[World, Op], None]], Callable[[World, Op], None]]:
    """Enter a function under its own name."""

    def enter(function: Callable[[World, Op], None]) -> Callable[[World, Op], None]:
        OPERATIONS[function.__name__] = function
        WEIGHTS[function.__name__] = weight
        return function

    return enter


def look_evaluation(
    world: World, op: Op, where: str, *, grad_mode: Any = torch.no_grad, training: bool = False
) -> None:
    """Outputs without gradients, twice: the second time from whatever the first has kept."""
    world.model.train(training)
    with grad_mode():
        for _ in range(2):
            y, run = world.forward(world.input(), op.consumer)
            world.compare_output(y, run, where)


def look_gradients(world: World, op: Op, where: str, *, training: bool = True, call: Any = None, **how: Any) -> None:
    """One forward and backward pass; leaves the gradients."""
    world.model.train(training)
    world.clear()
    x = world.input()
    y, run = world.forward(x, op.consumer, call)
    world.step_loss([y], [run])
    world.compare([y], [run], [x], where, **how)


LOOKS: list[Callable[[World, Op, str], None]] = [
    look_evaluation,
    look_gradients,
    lambda world, op, where: look_gradients(world, op, where, training=False),
    lambda world, op, where: look_evaluation(world, op, where, training=True),
]


def look(world: World, op: Op, where: str) -> None:
    """Compare in one of several modes."""
    LOOKS[op.b % len(LOOKS)](world, op, where)


@operation()
def evaluate(world: World, op: Op) -> None:
    look_evaluation(world, op, "evaluation", grad_mode=torch.inference_mode if op.a % 3 == 0 else torch.no_grad)


@operation()
def evaluate_with_gradients(world: World, op: Op) -> None:
    look_gradients(world, op, "evaluation with gradients", training=False)


@operation()
def no_grad_in_training(world: World, op: Op) -> None:
    look_evaluation(world, op, "no_grad in training", training=True)


def unmerged(world: World) -> None:
    """Take back a merge; the original weights come back bit for bit."""
    if world.merged is not None:
        world.model.unmerge_adapter()
        has_originals(world)


def has_originals(world: World) -> None:
    """Nothing is merged any more."""
    world.merged = None
    for name, weight in world.weights.items():
        if not same_bits(world.original(name).detach(), weight):
            raise Disagreement("unmerged weight differs")


def optimizer(world: World, kind: str) -> torch.optim.Optimizer:
    """One that lives as long as the parameters of the active adapters do."""
    key = f"{kind} {world.active}"
    if key not in world.optimizers:
        parameters = list(world.trained().values())
        if kind == "adamw":
            world.optimizers[key] = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
        else:
            world.optimizers[key] = FreeingSGD(parameters) if kind == "freeing" else torch.optim.SGD(parameters, lr=0.1)
    return world.optimizers[key]


@torch.no_grad()
def clip(world: World) -> None:
    """Gradients of norm 1 for each tensor, so that no sequence diverges."""
    for parameter in world.trained().values():
        if parameter.grad is not None:
            parameter.grad.div_(parameter.grad.norm() + 1e-9)


class FreeingSGD(torch.optim.Optimizer):
    """Writes through .data and frees each gradient within step()."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.1)
                    parameter.grad = None


def train(world: World, op: Op, kind: str) -> None:
    look_gradients(world, op, f"training by {kind}")
    clip(world)
    optimizer(world, kind).step()


@operation(20)
def train_sgd(world: World, op: Op) -> None:
    train(world, op, "sgd")


@operation(20)
def train_adamw(world: World, op: Op) -> None:
    train(world, op, "adamw")


@operation()
def step_frees_gradients(world: World, op: Op) -> None:
    """Some updates are no torch.optim.Optimizer at all."""
    look_gradients(world, op, "before a step that frees gradients")
    clip(world)
    if op.a % 2:
        optimizer(world, "freeing").step()
    else:
        for parameter in world.trained().values():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-0.1)
                parameter.grad = None
    look(world, op, "after a step that frees gradients")


@operation()
def accumulate(world: World, op: Op) -> None:
    """Two micro-batches, then one step."""
    world.model.train()
    world.clear()
    inputs, outputs, runs = [world.input(), world.input()], [], []
    for x in inputs:
        y, run = world.forward(x, op.consumer)
        world.step_loss([y], [run])
        outputs.append(y)
        runs.append(run)
    world.compare(outputs, runs, inputs, "two micro-batches")
    clip(world)
    optimizer(world, "adamw" if op.a % 2 else "sgd").step()


@operation()
def step_in_backward(world: World, op: Op) -> None:
    """The optimizer is fused into the backward pass: each parameter steps as soon as its gradient is there."""
    world.model.train()
    world.clear()
    gradients: dict[str, Tensor | None] = {}

    def stepper(name: str, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        own = torch.optim.SGD([parameter], lr=1.0) if op.a % 2 else None

        def step(_: Tensor) -> None:
            gradients[name] = parameter.grad.clone()
            parameter.grad.mul_(0.1 / (parameter.grad.norm() + 1e-9))
            if own is None:
                parameter.data.sub_(parameter.grad)
            else:
                own.step()
            parameter.grad = None

        return step

    handles = [
        p.register_post_accumulate_grad_hook(stepper(".".join(key), p))
        for key, p in world.trained().items()
        if p.requires_grad
    ]
    x = world.input()
    y, run = world.forward(x, op.consumer)
    world.step_loss([y], [run])
    for handle in handles:
        handle.remove()
    world.compare([y], [run], [x], "step in backward", gradients=gradients)
    look(world, op, "after a step in backward")
