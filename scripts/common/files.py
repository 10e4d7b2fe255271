"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for a file or a folder, beside `path` and with its suffix, that takes its place once all is written.

    If both are folders, then what was written takes the places of its namesakes and the rest of `path` stays. After an
    exception `path` is what it was, and the temporary name is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            for entry in list(temporary.iterdir()):
                entry.replace(path / entry.name)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, which never holds half of it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def digest(*paths: Path) -> str:
    """Hexadecimal digits that differ if the content of these files does."""
    whole = hashlib.sha256()
    for path in paths:
        of_file = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                of_file.update(block)
        whole.update(of_file.digest())
    return whole.hexdigest()[:16]
