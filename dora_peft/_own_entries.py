"""A DoraConfig's entries as a LoraConfig with `use_dora` has them, and back.

What LoraConfig does not know, and what had to be changed for it, lies inside `auto_mapping`: plain PEFT keeps unknown
entries there silently, while an unknown top-level key makes it warn in a file and fail in Python.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

from peft import LoraConfig

Config = TypeVar("Config")
Names = list[str] | set[str] | str | None

# The key inside `auto_mapping`. Its presence marks a folder as written by this package.
MARKER = "dora_peft"
# Our entries that describe the saved tensors instead of the adapter's options, so that they are no fields.
ROW_RECORDS = ("tied_rows", "filled_rows")
RECORDS = (*ROW_RECORDS, "base_quantization")
# Fields of LoraConfig that magnitude-only modules have changed for it; ours are kept beside it.
_CHANGED = ("target_modules", "rank_pattern", "init_lora_weights")
LORA_FIELDS = {f.name: f for f in fields(LoraConfig)}


def pack(config: Any) -> dict[str, Any]:
    """The entries of a DoraConfig as LoraConfig's, our own ones under auto_mapping["dora_peft"]."""
    own = {f.name: jsonable(getattr(config, f.name)) for f in fields(config) if f.name not in LORA_FIELDS}
    out = {f.name: jsonable(getattr(config, f.name)) for f in fields(config) if f.name in LORA_FIELDS}
    # written only if set: older PEFT versions warn about a field that they do not know
    newer = ("corda_config", "lora_ga_config", "peft_version")
    out = {name: value for name, value in out.items() if value is not None or name not in newer}
    if config.magnitude_only_modules and config.init_lora_weights == "orthogonal":
        # plain PEFT refuses it for the odd rank of magnitude-only modules; what is loaded needs no initialisation
        own["init_lora_weights"], out["init_lora_weights"] = "orthogonal", True
    if config.magnitude_only_modules:
        own["target_modules"], own["rank_pattern"] = out["target_modules"], dict(config.rank_pattern)
        out["target_modules"] = jsonable(union(config.target_modules, config.magnitude_only_modules))
        out["rank_pattern"] = {**config.magnitude_only_ranks, **config.rank_pattern}
    own.update({name: record for name in RECORDS if (record := getattr(config, name)) is not None})
    out["peft_type"], out["use_dora"] = "LORA", True
    out["auto_mapping"] = {**(config.auto_mapping or {}), MARKER: own}
    return out


def read_packed(cls: type[Config]) -> type[Config]:
    """Have a config class take what `pack` gives: `DoraConfig(**DoraConfig(...).to_dict())`."""
    generated: Callable[..., None] = cls.__init__

    @wraps(generated)
    def __init__(self: Any, *args: object, **kwargs: Any) -> None:
        mapping = kwargs.get("auto_mapping")
        if not isinstance(mapping, dict) or MARKER not in mapping:
            generated(self, *args, **kwargs)
            return
        own = entries_of(mapping[MARKER], f"auto_mapping[{MARKER!r}]")
        kwargs["auto_mapping"] = {name: value for name, value in mapping.items() if name != MARKER} or None
        in_file = kwargs.get("rank_pattern")
        _put_back(own, kwargs, {f.name for f in fields(cls)} - LORA_FIELDS.keys())  # type: ignore[arg-type]
        generated(self, *args, **kwargs)
        # These are more than ours: those of the magnitude-only modules.
        if "rank_pattern" in own and isinstance(in_file, dict):
            self.magnitude_only_ranks.update({k: v for k, v in in_file.items() if k not in self.rank_pattern})
        for name in RECORDS:
            setattr(self, name, own.get(name))

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls


def _put_back(own: dict[str, Any], entries: dict[str, Any], own_fields: set[str]) -> None:
    """Undo in `entries` what `pack` did; whatever somebody has changed or added there since is left as it is."""
    for name in own_fields & own.keys():
        entries.setdefault(name, own[name])
    if "target_modules" in own:
        both = _names(own["target_modules"]), _names(own.get("magnitude_only_modules"))
        # what is none is named by the config's own checks
        joined = jsonable(union(*both)) if all(one is None or isinstance(one, (str, set)) for one in both) else None
        if joined is None or jsonable(_names(entries.get("target_modules", joined))) == joined:
            entries["target_modules"] = own["target_modules"]
    if isinstance(own.get("rank_pattern"), dict):
        found, before = entries.get("rank_pattern"), own["rank_pattern"]
        # what is no pattern is named by the config's own checks
        if (
            not isinstance(found, dict)
            or not all(isinstance(name, str) for name in found)
            or not all(isinstance(rank, int) for rank in before.values())
        ):
            found = before
        # those of magnitude-only modules are of one module each, see `adapters.names.exactly`
        entries["rank_pattern"] = {
            name: rank for name, rank in found.items() if name in before or not name.startswith("^")
        }
    elif "rank_pattern" in own:
        entries["rank_pattern"] = own["rank_pattern"]
    if "init_lora_weights" in own and entries.get("init_lora_weights", True) is True:
        entries["init_lora_weights"] = own["init_lora_weights"]
    unknown = sorted(own.keys() - own_fields - {*_CHANGED, *RECORDS})
    if unknown:
        warnings.warn(
            f"Unexpected entries {unknown} in auto_mapping[{MARKER!r}], these are ignored: a newer dora_peft may have "
            "written them.",
            stacklevel=4,
        )


def entries_of(value: object, name: str) -> dict[str, Any]:
    """A dictionary of an adapter_config.json, empty for None."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a dictionary, found {value!r}. Save or download the adapter again.")
    return value or {}


def jsonable(value: object) -> object:
    """A config's value as JSON has it, in a fixed order."""
    if is_dataclass(value):
        return {f.name: jsonable(getattr(value, f.name)) for f in fields(value)}
    return sorted(value) if isinstance(value, set) else value


def union(first: Names, second: Names) -> Names:
    """The target modules that match what either matches."""
    if not first or not second:
        return first or second
    if isinstance(first, set) and isinstance(second, set):
        return first | second
    return "|".join(f"(?:{_as_regex(names)})" for names in (first, second))


def _names(value: Any) -> Names:
    """Module names as a config holds them: a list as a set; what is none of theirs is left to the config's checks."""
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return set(value)
    return value  # type: ignore[no-any-return]


def _as_regex(names: list[str] | set[str] | str) -> str:
    """A list of module names as the regular expression that PEFT would match in full."""
    if isinstance(names, str):
        return names
    return r"(?:.*\.)?(?:" + "|".join(re.escape(name) for name in sorted(names)) + ")"
