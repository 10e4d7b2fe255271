"""A user's mistakes in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class OptionError(ValueError):
    """An option that turned out impossible only when it was put to use."""


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def plain_errors(*kinds: type[Exception], traceback: bool = False) -> Iterator[None]:
    """End the process with status 1 and `error: ...` on one line for an exception of these kinds.

    Args:
        kinds: exceptions that say what the user can mend.
        traceback: let the exception through, for those who look for its cause.
    """
    try:
        yield
    except kinds as error:
        if traceback:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
