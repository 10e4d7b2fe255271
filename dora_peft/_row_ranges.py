"""Sets of rows as an adapter_config.json holds them: {module of the base model: [[start, stop], ...]}."""

from __future__ import annotations

import torch
from torch import Tensor

Ranges = list[list[int]]
# What a record says about one module: its rows [out], None for no rows, False if it says nothing.
Recorded = Tensor | bool | None
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")


def bare(name: str) -> str:
    """A module's name in the base model, from its name in a PeftModel, a state dict or a wrapper's."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")


def to_ranges(mask: Tensor) -> Ranges:
    """The rows of `mask` (bool [out]) as [[start, stop], ...]."""
    padded = torch.nn.functional.pad(mask.to("cpu", torch.int8), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    return [[start, stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def to_mask(ranges: Ranges, out_features: int) -> Tensor | None:
    """The rows as a mask, bool [out_features]; None if there are none.

    Raises:
        ValueError: A range lies outside of the layer.
    """
    mask = torch.zeros(out_features, dtype=torch.bool)
    for start, stop in ranges:
        if not 0 <= start < stop <= out_features:
            raise ValueError(f"rows {start}:{stop} of a layer with {out_features} rows")
        mask[start:stop] = True
    return mask if ranges else None


def checked_record(record: object, entry: str) -> dict[str, Ranges]:
    """The entry of an adapter_config.json, as it is.

    Args:
        record: What the file holds.
        entry: The entry's name, for the error.

    Raises:
        ValueError: It is not of the form {module name: [[start, stop], ...]}.
    """

    def is_range(pair: object) -> bool:
        return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(number) is int for number in pair)

    if isinstance(record, dict) and all(isinstance(v, list) and all(map(is_range, v)) for v in record.values()):
        return record
    raise ValueError(
        f"auto_mapping['dora_peft'][{entry!r}] of adapter_config.json: expected {{module name: [[start, stop], ...]}}, "
        f"found {str(record)[:100]!r}. Restore the file that save_pretrained wrote, or remove the entry: the rows are "
        "then found from the tensors."
    )


def recorded(record: dict[str, Ranges] | None, name: str, out_features: int, modules: set[str]) -> Recorded:
    """What a record says about one module.

    Args:
        record: `tied_rows` of a config, None if the folder has none.
        name: The module, as `bare` gives it.
        out_features: How many rows the module has.
        modules: All of the adapter's modules. A record that names others as well was made for another tree of modules
            (a loader that renames them), and its silence about this one means nothing.
    """
    if record is None:
        return False
    if name in record:
        return to_mask(record[name], out_features)
    return None if record.keys() <= modules else False
