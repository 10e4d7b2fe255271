"""The adapted model in memory, and the text that a plain LoRA is fitted and compared by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..formats import UnreadableError
from .adapted import AdaptedBase
from .calibration import SecondMoments, batched, encode, mean_squares, read_texts, tokenizer_of
from .comparison import TextReport, compare
from .gguf_checkpoint import loading_options
from .lowrank import Weights
from .plain import Factors

# More say little that some tens of thousands do not.
MOST_TOKENS = 65_536


@dataclass(frozen=True)
class Text:
    """Token ids, and the model that they are for.

    Attributes:
        model: The base with the adapters active.
        batches: [batch, length] each.
    """

    model: PeftModel
    batches: list[Tensor]

    def weights(self, paths: list[str], covariance: bool) -> Weights:
        """By what the fit of each module is weighted, see `lora.export_lora`."""
        if covariance:
            return SecondMoments(self.model, paths, self.batches)
        return mean_squares(self.model, paths, self.batches).get

    def compare(self, factors: Mapping[str, Factors]) -> TextReport:
        """What the text says of the plain LoRA."""
        return compare(self.model, factors, self.batches)


def text_for(adapted: AdaptedBase, path: str | os.PathLike[str]) -> Text:
    """Load the model and read a text.

    Raises:
        UnreadableError: There is no text or tokenizer, or the model is no causal language model.
    """
    folder, options = str(adapted.checkpoint.folder), loading_options(adapted.checkpoint)
    batches = batched(encode(read_texts(os.fspath(path)), tokenizer_of(folder, **options), most=MOST_TOKENS))
    try:
        base: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()
        raise UnreadableError(
            f"--calibration needs '{adapted.checkpoint.name}' as a causal language model: "
            f"{said[0] if said else type(error).__name__}"
        ) from error
    for name in adapted.quantised.paths if adapted.quantised is not None else ():
        weight = base.get_submodule(name).get_parameter("weight")
        weight.data = adapted.requantised(name, weight.data).to(weight.dtype)
    base.to(adapted.device)
    return Text(adapted.over(base), [ids.to(adapted.device) for ids in batches])
