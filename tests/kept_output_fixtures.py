"""Operations that write over a layer's output past its version counter."""

import torch
from layer_fixtures import distance, seeded
from torch.utils.checkpoint import checkpoint


def behind(tensor):
    """The memory of a tensor, to be written as a kernel does: no version counter moves."""
    return tensor.detach().numpy()


class InForward(torch.autograd.Function):
    """y -> 2 y, written over y in the forward pass, as Liger's RoPE does."""

    @staticmethod
    def forward(ctx, y):
        behind(y)[...] *= 2
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class InBackward(torch.autograd.Function):
    """y -> y^2, whose gradient is written over y in the backward pass, as Liger's SwiGLU does."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        behind(y)[...] = behind(2 * y * g)
        return y


class InBackwardElsewhere(InBackward):
    """As `InBackward`, with the gradient in memory of its own and other numbers over y."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        gradient = 2 * y * g
        behind(y)[...] = 7
        return gradient


CONSUMERS = {
    "forward": (InForward.apply, lambda y: 2 * y),
    "backward": (InBackward.apply, lambda y: y * y),
    "backward elsewhere": (InBackwardElsewhere.apply, lambda y: y * y),
}
SURROUNDINGS = {
    "plain": lambda f, x: f(x),
    "checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
}


def gradients(model, x, consumer, apply):
    for leaf in (x, *model.parameters()):
        leaf.grad = None
    out = apply(lambda x: consumer(model(x)), x)
    (out * torch.randn(out.shape, generator=seeded(2))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert distance(grad, expected[name].double()) <= 1e-5, name
