"""How far a model with the exported LoRA is from the adapted one on a text: loss, and KL of what is predicted.

One model is in memory: the adapters are disabled, and hooks add B A x in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats import UnreadableError
from .calibration import base_layer, logits_of, module_of
from .plain import Factors

# Of logits that are in fp32 at a time.
_ROWS = 128


@dataclass(frozen=True)
class TextReport:
    """How far a model with the exported LoRA is from the adapted one on a text.

    Attributes:
        tokens: That were predicted.
        adapted_loss, exported_loss, base_loss: Cross entropy per token, in nats.
        exported_kl, base_kl: Of the adapted model's next-token distribution to the other's, per token, in nats.
    """

    tokens: int
    adapted_loss: float
    exported_loss: float
    base_loss: float
    exported_kl: float
    base_kl: float


def compare(model: nn.Module, factors: Mapping[str, Factors], batches: Sequence[Tensor]) -> TextReport:
    """Text loss of the adapted model, of the base with `factors` in the adapters' place and of the base, and KL.

    Args:
        model: The adapted model, a `PeftModel`: the base is it with its adapters disabled.
        factors: As they were written, by path.
        batches: Token ids, [batch, length] each.

    Raises:
        UnreadableError: The logits are not finite, or see `mean_squares`.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    tokens = 0
    with torch.no_grad():
        for ids in batches:
            adapted = logits_of(model, ids)
            with _disabled(model):
                base = logits_of(model, ids)
                with applied(model, factors):
                    exported = logits_of(model, ids)
            # the last one is followed by nothing
            target = ids[:, 1:].flatten().to(adapted.device)
            tokens += len(target)
            sums += _sums([logits[:, :-1].flatten(0, 1) for logits in (adapted, exported, base)], target)
    losses = (sums / max(1, tokens)).tolist()
    if not all(math.isfinite(value) for value in losses):
        raise UnreadableError(
            f"--calibration: the losses are {losses[0]}, {losses[1]} and {losses[2]} (with the adapter, with the "
            "exported LoRA, without): expected finite ones. Load the model in fp32 or bf16."
        )
    return TextReport(tokens, *losses)


def _sums(models: Sequence[Tensor], target: Tensor) -> Tensor:
    """Summed losses of three models and KLs of the first to the others, [5], from logits [n, vocabulary] in pieces."""
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(target), _ROWS):
        part = slice(start, start + _ROWS)
        logs = [F.log_softmax(logits[part].float(), -1) for logits in models]
        losses = [F.nll_loss(log, target[part], reduction="sum") for log in logs]
        kls = [F.kl_div(log, logs[0], reduction="sum", log_target=True) for log in logs[1:]]
        sums += torch.stack([value.double().cpu() for value in (*losses, *kls)])
    return sums


@contextmanager
def applied(model: nn.Module, factors: Mapping[str, Factors]) -> Iterator[None]:
    """A model whose modules add their plain LoRA, B A x, to what they give."""

    def added(own: Factors, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        A, B = (factor.to(output.device, torch.float32) for factor in (own.lora_A, own.lora_B))
        if own.embedding:
            # Gemma's is multiplied by a number, and so is its adapter
            update = F.embedding(x, A.T) @ B.T * getattr(base_layer(module), "embed_scale", 1.0)
        else:
            update = x.float() @ A.T @ B.T
        return (output.float() + update).to(output.dtype)

    with ExitStack() as stack:
        for path, own in factors.items():
            module = module_of(model, path)
            hook = module.register_forward_hook(lambda m, inputs, output, own=own: added(own, m, inputs, output))
            stack.callback(hook.remove)
        yield


def _disabled(model: nn.Module) -> AbstractContextManager[None]:
    """The model without its adapters."""
    if not isinstance(model, PeftModel):
        raise UnreadableError(f"Expected a PeftModel with the adapter, found a {type(model).__name__}.")
    return model.disable_adapter()
