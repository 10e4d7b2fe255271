"""Whether a config's values are of the types that its fields are declared with, and what to say if not.

A dataclass takes anything; a wrong entry of an adapter_config.json would come up far from there, as a TypeError of
somebody else's.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES: dict[object, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("True or False", "True or False"),
    str: ("a string", "strings"),
    dict: ("a dictionary", "dictionaries"),
    type(None): ("None", "None"),
}


def check_types(config: object, skip: Iterable[str] = ()) -> None:
    """Compare the fields of a dataclass with their declared types.

    Numbers are accepted for `float` if they are finite, tuples and sets for lists, and anything for `object`.

    Raises:
        ValueError: A value is of another type; the field, what it takes and what was found are named.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, hint = getattr(config, field.name), hints[field.name]
        if field.name not in skip and not fits(value, hint):
            raise ValueError(f"{field.name} must be {describe(hint)}, found {value!r}.{_default(field)}")


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a declared type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        # 1 == True
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (list, set):
        return isinstance(value, (list, tuple, set, frozenset)) and all(fits(one, inner[0]) for one in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            return False
        return all(fits(one, kind) for one, kind in zip(value, inner, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            return False
        return all(fits(key, inner[0]) and fits(one, inner[1]) for key, one in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        # written as its value
        return isinstance(value, hint) or any(value == one.value for one in hint)
    return hint in (Any, object) or isinstance(value, hint)


def describe(hint: Any, *, many: bool = False) -> str:
    """What a declared type takes, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(one, many=many) for one in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (list, set):
        return f"{'lists' if many else 'a list'} of {describe(inner[0], many=True)}"
    if origin is tuple:
        return f"{'lists' if many else 'a list'} of {len(inner)} {describe(inner[0], many=True)}"
    if origin is dict:
        named = f"from {describe(inner[0], many=True)} to {describe(inner[1], many=True)}"
        return f"{'dictionaries' if many else 'a dictionary'} {named}"
    return _NAMES.get(hint, (getattr(hint, "__name__", str(hint)),) * 2)[many]


def _default(field: dataclasses.Field[Any]) -> str:
    """What to take instead, if there is a default."""
    if field.default is not dataclasses.MISSING:
        return f" The default is {field.default!r}."
    if field.default_factory is not dataclasses.MISSING:
        return f" The default is {field.default_factory()!r}."
    return ""
