"""A member of `peft.PeftType`. The enum cannot be extended, and a plain string would not do: transformers reads its
`.value`."""

from __future__ import annotations

from peft.utils import PeftType


def add_peft_type(name: str = "DORA") -> PeftType:
    """Add a member to `peft.PeftType`, once, and return it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Some releases of Python 3.13 look values up here.
    if hasattr(PeftType, "_hashable_values_"):
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    return member
