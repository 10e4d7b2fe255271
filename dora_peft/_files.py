"""Writing files so that a failure leaves the old ones, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def atomic_write_text(path: str, text: str) -> None:
    """Write `text` to `path` through a temporary name beside it, or leave `path` as it was."""
    with (
        staged_directory(os.path.dirname(path) or ".") as staging,
        open(os.path.join(staging, os.path.basename(path)), "w", encoding="utf-8") as file,
    ):
        file.write(text)


@contextmanager
def staged_directory(target: str) -> Iterator[str]:
    """A temporary directory beside the files of `target`; on success its files are renamed into `target`.

    Otherwise nothing in `target` has changed, and the temporary directory is gone.
    """
    created, folder = [], os.path.abspath(target)
    while not os.path.exists(folder):
        created.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(target, exist_ok=True)
    staging = tempfile.mkdtemp(prefix=".saving-", dir=target)
    try:
        yield staging
        moved = []
        for root, _, names in os.walk(staging):
            folder = os.path.normpath(os.path.join(target, os.path.relpath(root, staging)))
            os.makedirs(folder, exist_ok=True)
            moved += [(os.path.join(root, name), os.path.join(folder, name)) for name in names]
        for source, destination in moved:
            os.replace(source, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        # The deepest comes first.
        for folder in created:
            if not os.listdir(folder):
                os.rmdir(folder)
