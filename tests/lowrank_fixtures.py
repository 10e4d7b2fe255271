"""Updates of modules in memory, and a small model with DoRA whose updates they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from format_fixtures import llama, shaken
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dora_peft import DoraConfig
from dora_peft.layers import DoraLayer


@dataclass
class Update:
    """dW = (c - 1) W0 + B A of one module, given in blocks that share one memory."""

    path: str
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    c: Tensor
    embedding: bool = False
    kernel: tuple[int, ...] = ()
    step: int = 7

    @property
    def out_features(self) -> int:
        return len(self.weight)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def dense(self) -> Tensor:
        """dW in fp64."""
        weight, lora_A, lora_B, c = (t.double() for t in (self.weight, self.lora_A, self.lora_B, self.c))
        return (c - 1)[:, None] * weight + lora_B @ lora_A

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        memory = torch.empty(self.step, self.in_features)
        for start in range(0, self.out_features, self.step):
            stop = min(start + self.step, self.out_features)
            rows = memory[: stop - start]
            rows.copy_(self.dense()[start:stop])
            yield start, stop, rows
        memory.fill_(torch.nan)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def scale_change(self) -> Tensor:
        return self.c - 1


def update(
    out: int, columns: int, rank: int = 4, path: str = "layer", scale: float = 0.02, seed: int = 0, **options: object
) -> Update:
    """One whose low-rank part is a tenth of W0, and whose c spreads by `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, lora_A, lora_B = random(out, columns), random(rank, columns), random(out, rank)
    lora_B *= 0.1 * weight.norm() / (lora_B @ lora_A).norm()
    return Update(path, weight, lora_A, lora_B, 1 + scale * random(out), **options)  # type: ignore[arg-type]


def adapted(model: nn.Module | None = None, **options: object) -> PeftModel:
    """A LLaMA with DoRA as after training."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    return shaken(get_peft_model(llama() if model is None else model, DoraConfig(**options))).eval()


def updates_of(model: PeftModel) -> list[Update]:
    """The updates of all adapted modules, by their own merge."""
    found = []
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, DoraLayer):
            base = layer.get_base_layer()
            turned = isinstance(base, nn.Embedding)
            weight = base.weight.detach().T if turned else base.weight.detach()
            factors = [factor.detach() for factor in layer.factors("default")]
            with torch.no_grad():
                c = layer.scale("default").detach().flatten()
            lora_A, lora_B = factors[0], layer.scaling["default"] * c[:, None] * factors[1]
            found.append(Update(path, weight, lora_A, lora_B, c, embedding=turned))
    return found
