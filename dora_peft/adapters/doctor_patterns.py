"""The regular expressions of a config, tried where they can neither hang nor stop who asks.

Whether an expression comes to an end cannot be told from its text, so that it is tried in a process with a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

# For all names of a model; sound expressions need milliseconds.
SECONDS = 10.0
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
found, error = [], None
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except Exception as caught:
        error = f"'{pattern[:200]}' is no regular expression: {caught}"
        break
    found.append([i for i, name in enumerate(names) if compiled.fullmatch(name)])
json.dump([found, error], sys.stdout)
"""


class PatternError(ValueError):
    """What is wrong with an expression, a part of a sentence."""


def is_plain(pattern: str) -> bool:
    """Whether an expression has no quantifier, group or set: it is compared letter by letter, and comes to an end."""
    return re.fullmatch(r"[\w.\\^-]*", pattern) is not None


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    """The names that each expression matches as a whole.

    Raises:
        PatternError: One is no regular expression, or all together do not come to an end in `SECONDS`.
    """
    try:
        if all(is_plain(pattern) for pattern in patterns):
            return [{name for name in names if re.fullmatch(pattern, name)} for pattern in patterns]
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD], input=json.dumps([list(patterns), list(names)]),
            capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
    except re.error as error:
        raise PatternError(f"'{error.pattern!s}' is no regular expression: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise PatternError(
            f"it does not come to an end within {SECONDS:g} seconds on the names of these modules (repetitions inside "
            "repetitions are tried in all ways), and readers would hang"
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise PatternError(f"it cannot be tried in a process of its own: {error}") from error
    found, wrong = json.loads(done.stdout)
    if wrong is not None:
        raise PatternError(" ".join(str(wrong).split()))
    return [{names[i] for i in indices} for indices in found]
