"""What users put on the modules of an adapter: hooks, masks, parametrizations; and the truth about computed weights."""

import warnings

import torch
from layer_fixtures import Truth, adapted, distance, dora, seeded
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

# Of each, whether A and B are modules is another question only for the embedding.
KINDS = ["linear", "Conv1D", "conv1d", "conv2d", "conv3d", "conv2d-grouped"]
ALL_KINDS = [*KINDS, "embedding", "embedding-padding"]


class Bent(nn.Module):
    def forward(self, weight):
        return weight + 0.3 * torch.sin(2 * weight)


def mask(holder, name):
    prune.random_unstructured(holder, name, 0.5)
    return lambda: prune.remove(holder, name)


def parametrization(holder, name):
    parametrize.register_parametrization(holder, name, Bent())
    return lambda: parametrize.remove_parametrizations(holder, name)


def weight_norm(holder, name):
    parametrizations.weight_norm(holder, name)
    with torch.no_grad():
        getattr(holder.parametrizations, name).original0.mul_(1.5)
    return lambda: parametrize.remove_parametrizations(holder, name)


def hooked_weight_norm(holder, name):
    """By a forward pre-hook, which torch still has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(holder, name)
    with torch.no_grad():
        getattr(holder, f"{name}_g").mul_(1.5)
    return lambda: nn.utils.remove_weight_norm(holder, name)


COMPUTED = {f.__name__: f for f in (mask, parametrization, weight_norm, hooked_weight_norm)}


def holders(layer, adapter="default"):
    """By symbol, what holds A, B and m, and under which name."""
    name = adapter if isinstance(layer.factor_modules(adapter)[0], nn.ParameterDict) else "weight"
    lora_A, lora_B = layer.factor_modules(adapter)
    return {"A": (lora_A, name), "B": (lora_B, name), "m": (layer.lora_magnitude_vector[adapter], "weight")}


def attach(layer, how, symbols="AB"):
    """Have these tensors of the adapter computed; gives what takes it back."""
    undo = [COMPUTED[how](*holders(layer)[symbol]) for symbol in symbols]
    return lambda: [one() for one in undo]


def recompute(holder):
    for hook in holder._forward_pre_hooks.values():
        hook(holder, ())


def leaves(layer):
    """By symbol and name, the parameters that A, B and m are computed from, or are."""
    return {f"{s}.{n}": p for s, (holder, _) in holders(layer).items() for n, p in holder.named_parameters()}


def check_computed(model, x, *, detach=True, **options):
    """Forward and the gradients of x and of all that A, B and m are computed from, against the reference in float64.

    The reference gives dL/dA; what A is computed from gets it by the chain rule, from the weight's own computation.
    """
    layer = dora(model)
    y = model(x)
    probe = torch.randn(y.shape, generator=seeded(2), dtype=y.dtype)
    own = leaves(layer)
    wanted = {**({"x": x} if x.requires_grad else {}), **own}
    grads = torch.autograd.grad(y, list(wanted.values()), probe, allow_unused=True, retain_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    # with the weights as they are now, which nothing has changed since
    for holder, _ in holders(layer).values():
        recompute(holder)
    truth = Truth(model, x, detach=detach, **options)
    assert distance(y, truth.y) < 1e-12
    expected = truth.gradients(probe)
    if "x" in wanted:
        assert distance(found["x"], expected["x"]) < 1e-11
    compared = 0
    for symbol, (holder, name) in holders(layer).items():
        effective, grad = getattr(holder, name), expected[f"default.{symbol}"]
        sources = {n: p for n, p in own.items() if n.startswith(f"{symbol}.")}
        chained = (
            [grad]
            if effective.is_leaf
            else torch.autograd.grad(effective, list(sources.values()), grad, allow_unused=True)
        )
        for source, want in zip(sources, chained, strict=True):
            compared += 1
            assert found[source] is not None, source
            # weight_norm of single numbers has a direction without a gradient
            error = (found[source].flatten() - want.flatten()).norm()
            assert error <= 1e-11 * max(want.norm(), grad.norm()), source
    assert compared >= 3
    return y


def takes_fast_road(model, x):
    """Whether the layer's own autograd functions computed, or for the linear layer its shortcut would."""
    layer = dora(model)
    with torch.enable_grad():
        layer(x)
        return type(layer(x).grad_fn).__name__ in ("_LinearBackward", "_ComposeBackward")


def in_float64(kind, **options):
    # PEFT creates adapters of float64 layers in fp32
    return adapted(kind, torch.float64, **options).double()


def recorded(model, names=("lora_dropout", "lora_A", "lora_B")):
    """What hooks on the adapter's modules see: (name, input, output), in order."""
    seen = []
    for name in names:
        module = getattr(dora(model), name)["default"]
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.append((name, args[0].detach(), out.detach()))
        )
    return seen


def leaves_of(model):
    layer = dora(model)
    return [getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B", "lora_magnitude_vector")]


def ablate(module, args, out):
    return out * 0
