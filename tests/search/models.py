"""The models and configurations of the search, as plain values that print in one line, and what is built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import consumers
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dora_peft import DoraConfig

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 9


@dataclass(frozen=True)
class Shape:
    """A model's layers by name, and the order in which a forward pass runs them."""

    layers: tuple[str, ...]
    stages: tuple[str, ...]
    # that an adapter may adapt
    targets: tuple[str, ...]


SHAPES = {
    "chain": Shape(("a", "b"), ("a", "b"), ("a", "b")),
    # a runs twice in each forward pass
    "twice": Shape(("a", "b"), ("a", "b", "a"), ("a", "b")),
    "one": Shape(("a",), ("a",), ("a",)),
    "glu": Shape(("gate", "up", "down"), ("gate", "up", "down"), ("gate", "up", "down")),
    "embedding": Shape(("e", "a"), ("e", "a"), ("e", "a")),
    # a's weight is the embedding's
    "tied": Shape(("e", "a"), ("e", "a"), ("e", "a")),
    # b is the module a under another name, without adapter
    "alias": Shape(("a", "b"), ("a", "b"), ("a",)),
    # a's weight is a parametrisation
    "computed": Shape(("a", "b"), ("a", "b"), ("a", "b")),
    "conv1d": Shape(("a", "b"), ("a", "b"), ("a", "b")),
    "conv2d": Shape(("a", "b"), ("a", "b"), ("a", "b")),
    "grouped": Shape(("a", "b"), ("a", "b"), ("a", "b")),
}
UNMERGEABLE = {"grouped"}
# to merge; or do it right
MAY_REFUSE = {"alias", "computed"}


@dataclass(frozen=True)
class ModelSpec:
    """A base model.

    Attributes:
        shape: One of SHAPES.
        dtype: Of its weights.
        bias: "none", "small", or "large", which is a hundred times the rest of an output.
        transposed: Whether its second linear layer is transformers' Conv1D.
        zero_rows: How many rows of each weight are 0.
        tokens: How many inputs at a time; with many, linear layers take another road.
    """

    shape: str = "one"
    dtype: str = "float32"
    bias: str = "none"
    transposed: bool = False
    zero_rows: int = 0
    tokens: int = 3
    seed: int = 0


@dataclass(frozen=True)
class ConfigSpec:
    """An adapter.

    Attributes:
        magnitude_only: How many of the targets, counted from the last, train the magnitude alone.
        fewer: Whether the first target is left out, where there are others.
        filled: Whether A, B and m are moved away from their initial values.
        low_precision: Whether A, B and m take the dtype of the base.
    """

    r: int = 2
    alpha: int = 4
    rslora: bool = False
    detach_norm: bool = True
    magnitude_only: int = 0
    fewer: bool = False
    init: bool | str = True
    filled: bool = True
    low_precision: bool = False
    seed: int = 0


MODELS = st.builds(
    ModelSpec,
    shape=st.sampled_from(["one", *SHAPES, "chain", "glu", "twice", "chain"]),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
    bias=st.sampled_from(["none", "small", "small", "large"]),
    transposed=st.booleans(),
    zero_rows=st.sampled_from([0, 0, 1, 2]),
    tokens=st.sampled_from([3, 12]),
    seed=st.integers(0, 9),
)
CONFIGS = st.builds(
    ConfigSpec,
    r=st.integers(1, 3),
    alpha=st.sampled_from([4, 1, 3]),
    rslora=st.booleans(),
    detach_norm=st.sampled_from([True, True, False]),
    magnitude_only=st.sampled_from([0, 0, 0, 1]),
    fewer=st.sampled_from([False, False, True]),
    init=st.sampled_from([True, True, False, "gaussian", "orthogonal"]),
    filled=st.sampled_from([True, True, True, False]),
    low_precision=st.sampled_from([False, False, False, True]),
    seed=st.integers(0, 9),
)


def generator(seed: int) -> torch.Generator:
    """Random numbers that do not depend on what ran before."""
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """A model of one shape. `consumer` and `checkpointing` are set by the operation that runs it.

    Attributes:
        consumer: What is done to the output of each layer, one of consumers.APPLY.
        checkpointing: None, "reentrant" or "non-reentrant": around every stage.
        masks: Where relu_ writes down what it lets through, by stage.
    """

    def __init__(self, shape: str, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.shape, self.consumer, self.checkpointing = shape, "silu", None
        self.masks: dict[int, Tensor] = {}
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        # a later pass may have others before this one is recomputed
        consumer, masks = self.consumer, self.masks

        def compute(index: int, name: str, x: Tensor) -> Tensor:
            y = getattr(self, name)(x)
            return consumers.APPLY[consumer](y, lambda mask: masks.__setitem__(index, mask))

        return run(self.shape, x, compute if self.checkpointing is None else self.recomputed(compute))

    def recomputed(self, compute: Callable[[int, str, Tensor], Tensor]) -> Callable[[int, str, Tensor], Tensor]:
        """The same stage under a checkpoint. One whose input has no gradient cannot be reentrant."""

        def stage(index: int, name: str, x: Tensor) -> Tensor:
            reentrant = self.checkpointing == "reentrant"
            if reentrant and not x.requires_grad:
                return compute(index, name, x)
            return checkpoint(compute, index, name, x, use_reentrant=reentrant, preserve_rng_state=False)

        return stage


def run(shape: str, x: Tensor, stage: Callable[[int, str, Tensor], Tensor]) -> Tensor:
    """The whole model from a function that runs one stage of it."""
    if shape == "glu":
        return stage(2, "down", stage(0, "gate", x) * stage(1, "up", x))
    for index, name in enumerate(SHAPES[shape].stages):
        x = stage(index, name, x)
    return x


def network(shape: str, consumer: str, masks: dict[int, Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """The same for the oracle: computes the model from x and a function that applies a layer."""
    return lambda x, call: run(
        shape, x, lambda index, name, value: consumers.pure(consumer, call(name, value), masks.get(index))
    )


def _linear(inputs: int, outputs: int, spec: ModelSpec, transposed: bool = False) -> nn.Module:
    if transposed:
        return Conv1D(outputs, inputs)
    return nn.Linear(inputs, outputs, bias=spec.bias != "none")


def _layers(spec: ModelSpec) -> dict[str, nn.Module]:
    has_bias = spec.bias != "none"
    groups = 2 if spec.shape == "grouped" else 1
    if spec.shape in ("chain", "twice"):
        return {"a": _linear(6, 8, spec), "b": _linear(8, 6, spec, spec.transposed)}
    if spec.shape == "computed":
        return {"a": nn.utils.parametrizations.weight_norm(_linear(6, 8, spec)), "b": _linear(8, 6, spec)}
    if spec.shape == "one":
        return {"a": _linear(6, 8, spec, spec.transposed)}
    if spec.shape == "glu":
        return {"gate": _linear(6, 8, spec), "up": _linear(6, 8, spec), "down": _linear(8, 6, spec, spec.transposed)}
    if spec.shape == "embedding":
        return {"e": nn.Embedding(VOCABULARY, 6), "a": _linear(6, 8, spec, spec.transposed)}
    if spec.shape == "tied":
        embedding, head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY, bias=has_bias)
        head.weight = embedding.weight
        return {"e": embedding, "a": head}
    if spec.shape == "alias":
        layer = _linear(6, 6, spec, spec.transposed)
        return {"a": layer, "b": layer}
    if spec.shape == "conv2d":
        return {"a": nn.Conv2d(3, 4, (2, 3), padding=1, bias=has_bias), "b": nn.Conv2d(4, 3, 2, 2, bias=has_bias)}
    return {
        "a": nn.Conv1d(4, 6, 3, padding=1, groups=groups, bias=has_bias),
        "b": nn.Conv1d(6, 4, 2, stride=2, bias=has_bias),
    }


@torch.no_grad()
def base(spec: ModelSpec) -> Net:
    """The base model, with the same numbers for the same spec."""
    net, random = Net(spec.shape, _layers(spec)), generator(spec.seed)
    for name, parameter in net.named_parameters():
        parameter.normal_(generator=random)
        if name.endswith("bias"):
            # and positive: silu would drown everything else
            if spec.bias == "large":
                parameter.abs_().mul_(100)
        elif isinstance(net.get_submodule(name.rpartition(".")[0]), (Conv1D, nn.Embedding)):
            parameter[:, : spec.zero_rows] = 0
        # the direction of a computed weight, of which 0 would give NaN
        elif not name.endswith("original1"):
            parameter[: spec.zero_rows] = 0
    return net.to(DTYPES[spec.dtype])


def example(spec: ModelSpec, dtype: torch.dtype, seed: int) -> Tensor:
    """An input in the shape that the model takes."""
    random = generator(seed)
    if spec.shape in ("embedding", "tied"):
        return torch.randint(0, VOCABULARY, (spec.tokens, 2), generator=random)
    sizes = {"conv1d": (4, 8), "grouped": (4, 8), "conv2d": (3, 4, 5)}.get(spec.shape, (6,))
    lengths = (2, spec.tokens) if sizes == (6,) and seed % 2 else (spec.tokens,)
    return torch.randn(*lengths, *sizes, generator=random).to(dtype)


def suited(config: ConfigSpec, spec: ModelSpec, like: ConfigSpec | None = None) -> ConfigSpec:
    """The nearest configuration that this model can have."""
    if spec.shape not in ("chain", "twice", "one", "glu", "alias", "computed") and config.init == "orthogonal":
        # PEFT has it for linear layers only
        config = replace(config, init="gaussian")
    if config.init == "orthogonal" or spec.shape == "grouped":
        config = replace(config, r=2)
    if spec.zero_rows and config.init is False:
        # B is not 0 there, so that no row is zero at creation
        config = replace(config, init=True)
    return config if like is None else replace(config, fewer=like.fewer, magnitude_only=like.magnitude_only)


def targets(config: ConfigSpec, spec: ModelSpec) -> tuple[list[str], list[str]]:
    """The layers that train A, B and m, and those that train m alone."""
    names = list(SHAPES[spec.shape].targets)
    if config.fewer and len(names) > 1:
        names = names[1:]
    count = min(config.magnitude_only, len(names) - 1)
    return names[: len(names) - count], names[len(names) - count :]


def dora_config(config: ConfigSpec, spec: ModelSpec) -> DoraConfig:
    """The package's own configuration."""
    full, only = targets(config, spec)
    return DoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        detach_norm=config.detach_norm,
        init_lora_weights=config.init,
        target_modules=full,
        magnitude_only_modules=only or None,
    )


def scaling(config: ConfigSpec) -> float:
    """s of an adapter that nobody rescaled."""
    return config.alpha / (config.r**0.5 if config.rslora else config.r)
