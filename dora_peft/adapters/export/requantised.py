"""The base that a QDoRA adapter was trained over: that of full precision after bitsandbytes quantised it.

The magnitudes belong to the norms of the quantised weights, which NF4 moves by up to 1.9 %. Over the weights as they
were before, the adapter is another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..._own_entries import MARKER
from ...bases import base_weight
from ..formats import UnreadableError
from ..formats.source import Source

# What `--base-quantization` may say, as transformers' BitsAndBytesConfig has it.
NAMED: dict[str, dict[str, object] | None] = {
    "none": None,
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def recorded(sources: Sequence[Source], named: str | None) -> tuple[dict[str, object] | None, bool]:
    """How the base of adapters was quantised in training, None for not at all; and whether nobody says.

    Args:
        sources: The adapters.
        named: What to take instead of what their folders say, one of `NAMED`.

    Raises:
        UnreadableError: There is no such name, or the folders differ.
    """
    if named is not None:
        if named not in NAMED:
            raise UnreadableError(f"--base-quantization: expected one of {', '.join(NAMED)}, found {named!r}.")
        return NAMED[named], False
    found: list[dict[str, object] | None] = []
    for source in sources:
        mapping = (source.config or {}).get("auto_mapping")
        own = mapping.get(MARKER) if isinstance(mapping, dict) else None
        if isinstance(own, dict):
            record = own.get("base_quantization")
            found.append(record if isinstance(record, dict) and record else None)
    if any(record != found[0] for record in found):
        raise UnreadableError(
            "The adapters were trained over bases that were quantised in different ways, so that no base is that of "
            "all. Pass --base-quantization to say which to take."
        )
    return (found[0] if found else None), len(found) < len(sources)


class Quantised:
    """Which modules of a model bitsandbytes quantises, and what it makes of their weights.

    Args:
        record: What `quantization_config` says in texts and numbers.
        model: The model on the meta device, whose linear layers are exchanged.

    Attributes:
        record: As given.
        paths: The quantised modules, and whether each is a Conv1D.
        said: What it is, for comparison with another run's.

    Raises:
        UnreadableError: The record is of another method, or bitsandbytes is not installed.
    """

    def __init__(self, record: Mapping[str, object], model: nn.Module) -> None:
        method = record.get("quant_method")
        four, eight = bool(record.get("load_in_4bit")), bool(record.get("load_in_8bit"))
        if method not in (None, "bitsandbytes") or not (four or eight):
            gguf = method == "gguf"
            what = (
                f"a .gguf ({str(record.get('gguf_file'))[:80]})" if gguf else f"a base quantised by {str(method)[:40]}"
            )
            raise UnreadableError(
                f"The adapter was trained over {what}, and this base is not quantised: name "
                f"{'that file' if gguf else 'the quantised one'}, or pass --base-quantization none to take "
                "this one as it is."
            )
        try:
            import bitsandbytes as bnb
        except ImportError as error:
            raise UnreadableError(
                "The adapter was trained over a base quantised by bitsandbytes, which has to quantise it again here: "
                f"pip install bitsandbytes ({error}); or pass --base-quantization none to take the base as it is."
            ) from error
        self._bnb, self._four, self.record = bnb, four, record
        self.paths = _quantised_modules(record, model)
        self.said = f"{json.dumps(dict(record), sort_keys=True, default=str)} by {bnb.__version__}"

    def rounded(self, path: str, weight: Tensor) -> Tensor:
        """What is left of a weight after quantising, in its own layout, 4-bit ones in the same dtype.

        Args:
            path: The module, for errors.
            weight: [out, in]; [in, out] of a Conv1D, which transformers turns before it quantises.
        """
        turned = self.paths[path]
        matrix = weight.t() if turned else weight
        out_features, in_features = matrix.shape
        matrix = matrix.contiguous()
        layer: nn.Module
        if self._four:
            layer = self._bnb.nn.Linear4bit(in_features, out_features, bias=False)
            layer.weight = self._bnb.nn.Params4bit(
                matrix,
                requires_grad=False,
                quant_type=str(self.record.get("bnb_4bit_quant_type", "fp4")),
                compress_statistics=bool(self.record.get("bnb_4bit_use_double_quant", False)),
                module=layer,
            )
        else:
            layer = self._bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
            layer.weight = self._bnb.nn.Int8Params(matrix, requires_grad=False, has_fp16_weights=False)
        # quantises on the way, also from a device to itself
        layer.to(weight.device)
        found = base_weight(layer, path).dense()
        # bitsandbytes unpacks 4-bit weights into their first dtype; int8 ones have more digits than 16 bits hold
        found = found.to(weight.dtype) if self._four else found
        return found.t().contiguous() if turned else found


def _quantised_modules(record: Mapping[str, object], model: nn.Module) -> dict[str, bool]:
    """By the path of each module that transformers would have bitsandbytes quantise, whether it is a Conv1D."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    turned = {path: isinstance(module, Conv1D) for path, module in model.named_modules()}
    entries = {"load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
    config = BitsAndBytesConfig(**{name: value for name, value in record.items() if name in entries})
    named = record.get("llm_int8_skip_modules")
    skip = [str(name) for name in named] if isinstance(named, list) else get_keys_to_not_convert(model)
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=config)
    kinds = ("Linear4bit", "Linear8bitLt")
    return {path: turned[path] for path, module in model.named_modules() if type(module).__name__ in kinds}
