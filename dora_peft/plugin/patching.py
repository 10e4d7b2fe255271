"""Replacing an attribute of another library, and giving it back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

# The attribute of a replacement that holds what it replaces.
_ORIGINAL = "_dora_peft_original"

# A function of any signature: those that are replaced have different ones.
Function = Callable[..., Any]


def patch(owner: object, name: str, make: Callable[[Function], Function]) -> None:
    """Replace `owner.name` by make(original), a class or static method by one of the same kind.

    The original is the other library's however often this is called: patches do not stack.

    Args:
        owner: A class or module.
        name: Its attribute.
        make: From the original function to the new one, which gets the original's name and documentation.
    """
    current = inspect.getattr_static(owner, name)
    original = getattr(current, _ORIGINAL, current)
    replacement: object
    if isinstance(original, (classmethod, staticmethod)):
        function = original.__func__
        replacement = type(original)(wraps(function)(make(function)))
    else:
        replacement = wraps(original)(make(original))
    setattr(replacement, _ORIGINAL, original)
    setattr(owner, name, replacement)


def unpatch(owner: object, name: str) -> None:
    """Give `owner.name` back what `patch` replaced; nothing happens if it is not patched."""
    current = inspect.getattr_static(owner, name)
    setattr(owner, name, getattr(current, _ORIGINAL, current))


def patch_everywhere(name: str, make: Callable[[Function], Function], package: str = "peft") -> None:
    """`patch` a function in every module of a package that has imported it under its own name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == package and callable(vars(module).get(name)):
            patch(module, name, make)


@contextmanager
def unpatched(owner: object, *names: str) -> Iterator[None]:
    """Have the originals of these attributes in their places for as long as this is open."""
    replacements = {name: inspect.getattr_static(owner, name) for name in names}
    try:
        for name in names:
            unpatch(owner, name)
        yield
    finally:
        for name, replacement in replacements.items():
            setattr(owner, name, replacement)
