"""One run of the search: the model under test, what the search itself knows about it, and the comparison of the two."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import consumers
import models
import oracle
import torch
from models import SHAPES, ConfigSpec, ModelSpec, Net
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# What a result may be off, relative to its norm. In bf16 plain implementations, every operation in that
# precision, tell: three times their error and a floor of two units in the last place.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4}
FLOOR = 2.0**-7
# A gradient that is this much smaller than the others, element by element, is measured against them instead.
SMALL = 1e-3


class Disagreement(Exception):
    """The model under test and the oracle differ."""

    def __init__(self, what: str, found: float = float("nan"), allowed: float = 0.0) -> None:
        super().__init__(f"{what}: {found:.1e} > {allowed:.1e}" if found == found else what)
        self.what = what


@dataclass
class Known:
    """What the search knows of one adapter.

    Attributes:
        full, only: Layers whose A, B and m, or whose m alone, are trained.
        scaling: s by layer.
        factor: What all of them are multiplied by.
        tied: Rows of W0 that were zero at creation, by layer.
    """

    full: list[str]
    only: list[str]
    scaling: dict[str, float]
    tied: dict[str, Tensor]
    detach: bool
    config: ConfigSpec
    combined: bool = False
    factor: float = 1.0

    @property
    def layers(self) -> list[str]:
        return [*self.full, *self.only]


# other tensors, by layer, adapter and one of A, B, m
Overrides = dict[tuple[str, str, str], Tensor]


@dataclass
class Pass:
    """A forward pass for the oracle: the layers as they were then, the input, and the consumers' decisions."""

    layers: dict[str, oracle.Layer]
    x: Tensor
    consumer: str
    masks: dict[int, Tensor]
    probe: Tensor


@dataclass
class World:
    """The model under test and its ledger."""

    spec: ModelSpec
    first: ConfigSpec
    model: Any = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    adapters: dict[str, Known] = field(default_factory=dict)
    active: list[str] = field(default_factory=lambda: ["default"])
    merged: dict[str, Tensor] | None = None
    disabled: bool = False
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    # consumers
    used: set[str] = field(default_factory=set)
    inputs: Any = field(default_factory=itertools.count)
    folder: Any = None

    def start(self) -> None:
        net = models.base(self.spec)
        for name in SHAPES[self.spec.shape].layers:
            layer = getattr(net, name)
            self.weights[name] = layer.weight.detach().clone()
            bias = getattr(layer, "bias", None)
            self.biases[name] = None if bias is None else bias.detach().clone()
        config = models.suited(self.first, self.spec)
        self.model = get_peft_model(
            net, models.dora_config(config, self.spec), autocast_adapter_dtype=not config.low_precision
        ).train()
        self.note("default", config)

    def note(self, name: str, config: ConfigSpec) -> None:
        """Write an adapter that was just created into the ledger, and fill it."""
        full, only = models.targets(config, self.spec)
        tied = {layer: self.zero_rows(layer) for layer in [*full, *only]}
        scaling = dict.fromkeys([*full, *only], models.scaling(config))
        self.adapters[name] = Known(full, only, scaling, tied, config.detach_norm, config)
        if config.filled:
            self.fill(name, config.seed)

    def zero_rows(self, layer: str) -> Tensor:
        return (oracle.as_matrix(self.base(layer)) == 0).all(1)

    @torch.no_grad()
    def fill(self, adapter: str, seed: int) -> None:
        """Move A, B and m away from their initial values, in view of the version counters."""
        random = models.generator(seed)
        for (_, _, letter), parameter in self.parameters([adapter]).items():
            if letter == "m":
                parameter.mul_((torch.rand(parameter.shape, generator=random) + 0.5).to(parameter.dtype))
            else:
                width = parameter[0].numel() if letter == "A" else 2
                parameter.copy_(torch.randn(parameter.shape, generator=random) / width**0.5)

    @property
    def net(self) -> Net:
        return self.model.base_model.model

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    def dora(self, layer: str) -> Any:
        return getattr(self.net, layer)

    def parameters(self, adapters: Iterable[str]) -> dict[tuple[str, str, str], nn.Parameter]:
        """The trained parameters of these adapters by layer, adapter and one of A, B, m."""
        out = {}
        for adapter in adapters:
            known = self.adapters[adapter]
            for layer in known.layers:
                module = self.dora(layer)
                if layer in known.full:
                    out[layer, adapter, "A"], out[layer, adapter, "B"] = factors(module, adapter)
                out[layer, adapter, "m"] = module.lora_magnitude_vector[adapter].weight
        return out

    def trained(self) -> dict[tuple[str, str, str], nn.Parameter]:
        return self.parameters(self.active)

    def original(self, layer: str) -> Tensor:
        """The base layer's weight as the model holds it, merged or not."""
        return self.base_module(layer).weight

    def base_module(self, layer: str) -> nn.Module:
        module = getattr(self.net, layer)
        return getattr(module, "base_layer", module)

    def base(self, layer: str) -> oracle.Layer:
        """A layer without adapters."""
        module = self.base_module(layer)
        weight, bias = self.weights[layer], self.biases[layer]
        if isinstance(module, nn.Embedding):
            return oracle.Layer("embedding", weight)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            geometry = {"stride": module.stride[0], "padding": module.padding[0], "groups": module.groups}
            return oracle.Layer("convolution", weight, bias, **geometry)
        return oracle.Layer("transposed" if isinstance(module, Conv1D) else "linear", weight, bias)

    def layers(self, adapters: list[str] | None = None, overrides: Overrides | None = None) -> dict[str, oracle.Layer]:
        """All layers as they are now, with copies of the parameters; `adapters` stand for the active ones."""
        names = self.active if adapters is None else adapters
        tensors = {key: p.detach().clone() for key, p in self.parameters(names).items()} | (overrides or {})
        out = {}
        for layer in self.weights:
            made = out[layer] = self.base(layer)
            if self.disabled:
                continue
            if self.merged is not None and adapters is None and layer in self.merged:
                made.merged = self.merged[layer]
                continue
            for name in names:
                known = self.adapters[name]
                if layer in known.layers:
                    A, B, m = (tensors.get((layer, name, letter)) for letter in "ABm")
                    s = known.scaling[layer] * known.factor
                    made.adapters[name] = oracle.Adapter(A, B, m, s, known.tied[layer], known.detach)
        return out

    def input(self) -> Tensor:
        x = models.example(self.spec, self.dtype, next(self.inputs))
        return x.requires_grad_() if x.is_floating_point() else x

    def forward(
        self, x: Tensor, consumer: str = "silu", call: Callable[[Tensor], Tensor] | None = None, overrides: Any = None
    ) -> tuple[Tensor, Pass]:
        """The model's output, and what the oracle needs to compute it too."""
        self.net.consumer, masks = consumer, {}
        self.net.masks = masks
        layers = self.layers(overrides=overrides)
        kept = x.detach().clone()
        y = (self.model if call is None else call)(x)
        self.used.add(consumer)
        random = models.generator(int(y.numel()))
        probe = torch.randn(y.shape, generator=random).to(y.dtype)
        return y, Pass(layers, kept, consumer, masks, probe)

    def compare_output(self, y: Tensor, run: Pass, where: str, *, autocast: bool = False) -> None:
        """The output alone."""
        self.check_dtype([y], autocast, where)

        def compared(nudges: int) -> None:
            expected, allowed = self.truth([run], autocast, nudges)
            check({"output": y}, {"output": expected["output0"]}, {"output": allowed["output0"]}, where)

        self._with_more_plain_runs(compared, autocast)

    def _with_more_plain_runs(self, compared: Callable[[int], None], autocast: bool) -> None:
        """Compare; in low precision, what is off by more than few plain runs are is compared with more of them.

        A rounding may carry an element over the kink of an activation in one of many runs.
        """
        try:
            compared(2)
        except Disagreement:
            if not autocast and self.dtype in BOUNDS:
                raise
            compared(24)

    def truth(
        self, runs: list[Pass], autocast: bool = False, nudges: int = 2
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Outputs, and gradients of the sum of all passes, with what each may be off."""
        expected = self._sum(runs, torch.float64, oracle.apply)
        bound = 0.0 if autocast else BOUNDS.get(self.dtype, 0.0)
        if bound:
            return expected, dict.fromkeys(expected, bound)
        plain = [self._sum(runs, torch.bfloat16, apply) for apply in (oracle.apply, oracle.apply_branches)]
        for seed in range(nudges):
            apply = (oracle.apply, oracle.apply_branches)[seed % 2]
            plain.append(self._sum([nudged(run, seed) for run in runs], torch.bfloat16, apply))
        least = smallest(expected)
        errors = {k: max(distance(one[k], e, least) for one in plain) for k, e in expected.items()}
        # few elements may be right by luck, so that the mean counts as well
        mean = sum(errors.values()) / len(errors)
        return expected, {k: 3 * max(error, mean) + FLOOR for k, error in errors.items()}

    def _sum(self, runs: list[Pass], dtype: torch.dtype, apply: Any) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for i, run in enumerate(runs):
            masks = {k: mask.to(dtype) for k, mask in run.masks.items()}
            net = models.network(self.spec.shape, run.consumer, masks)
            y, gradients = oracle.evaluate(run.layers, run.x, net, run.probe, dtype, apply)
            total[f"output{i}"] = y
            if "x" in gradients:
                total[f"x{i}"] = gradients.pop("x")
            for name, gradient in gradients.items():
                total[name] = total.get(name, 0) + gradient.double()
        return total

    def compare(
        self,
        outputs: list[Tensor],
        runs: list[Pass],
        inputs: list[Tensor],
        where: str,
        *,
        gradients: dict[str, Tensor | None] | None = None,
        autocast: bool = False,
    ) -> None:
        """Outputs and all gradients of several passes whose losses were summed; `gradients` stand for `.grad`."""
        self.check_dtype(outputs, autocast, where)
        found: dict[str, Tensor | None] = {f"output{i}": y for i, y in enumerate(outputs)}
        found |= {f"x{i}": x.grad for i, x in enumerate(inputs) if x.is_floating_point()}
        found |= self.gradients() if gradients is None else gradients

        def compared(nudges: int) -> None:
            check(found, *self.truth(runs, autocast, nudges), where)

        self._with_more_plain_runs(compared, autocast)

    def check_dtype(self, outputs: list[Tensor], autocast: bool, where: str) -> None:
        for y in outputs:
            if not autocast and y.dtype != self.dtype:
                raise Disagreement(f"{where}: output in {y.dtype} from a model in {self.dtype}")

    def gradients(self) -> dict[str, Tensor | None]:
        return {".".join(key): p.grad for key, p in self.trained().items()}

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def step_loss(self, outputs: list[Tensor], runs: list[Pass]) -> None:
        """Backward through the sum of all passes."""
        loss: Any = sum((y * run.probe).sum() for y, run in zip(outputs, runs, strict=True))
        if loss.requires_grad:
            loss.backward()

    def place(self, name: str) -> Path:
        """A folder of this run."""
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory()
        return Path(self.folder.name) / name

    def close(self) -> None:
        if self.folder is not None:
            self.folder.cleanup()


def nudged(run: Pass, seed: int) -> Pass:
    """The same with weights and biases that are off by one rounding in bf16, which shows what is ill-conditioned."""

    def nudge(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=models.generator(seed), dtype=torch.float64) - 0.5
        return tensor.double() * (1 + noise * 2.0**-7)

    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else nudge(tensor)

    layers = {
        name: replace(layer, weight=nudge(layer.weight), bias=maybe(layer.bias), merged=maybe(layer.merged))
        for name, layer in run.layers.items()
    }
    return replace(run, layers=layers)


def factors(module: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B as PEFT names them."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def smallest(tensors: dict[str, Tensor]) -> float:
    """The root mean square that a gradient is measured against at least."""
    sizes = [t.double().square().mean().sqrt().item() for name, t in tensors.items() if not name.startswith("output")]
    return SMALL * max(sizes, default=0.0)


def distance(found: Tensor, expected: Tensor, least: float) -> float:
    """|found - expected| relative to |expected|; infinite where `found` is not finite."""
    difference = (found.detach().double() - expected.double()).norm().item()
    # what an activation far on its flat side leaves of it, 1e-35, is below fp32's normal numbers
    size = max(expected.double().norm().item(), least * expected.numel() ** 0.5, 1e-24)
    return difference / size if difference == difference else float("inf")


def check(found: dict[str, Tensor | None], expected: dict[str, Tensor], allowed: dict[str, float], where: str) -> None:
    """Raise a Disagreement for the worst of the results that are off by more than allowed."""
    least = smallest(expected)
    worst: tuple[float, str, float] = (1.0, "", 0.0)
    for name, value in expected.items():
        result = found.get(name)
        if result is None:
            if value.any():
                raise Disagreement(f"{where}: {kind_of(name)} missing")
            continue
        if result.shape != value.shape:
            value = value.view(result.shape)
        off = distance(result, value, 0.0 if name.startswith("output") else least)
        if not off <= allowed[name] * worst[0]:
            worst = (off / allowed[name], name, off)
    if worst[1]:
        raise Disagreement(f"{where}: {kind_of(worst[1])} off", worst[2], allowed[worst[1]])


def kind_of(name: str) -> str:
    """ "output", "x", or which of A, B and m, without the names of layer and adapter."""
    return name.rpartition(".")[2].rstrip("0123456789") if "." in name else name.rstrip("0123456789")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, and of one dtype."""
    return one.dtype == other.dtype and torch.equal(one, other)


def quiet(consumer: str) -> str:
    """The consumer, or one like it, that graph capture can follow."""
    return consumer if consumer in consumers.PLAIN else "double"
