"""Writing files so that a failure leaves the old ones, or none."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

# What torch.save's own writer says, in a RuntimeError without errno, if it cannot write.
_OF_TORCHS_WRITER = ("inline_container", "PytorchStreamWriter", "PyTorchFileWriter", "cannot be opened")


class NotSavedError(OSError):
    """Files could not be written; none of them is there, and old ones are as they were."""

    def __init__(self, what: str, target: str, error: BaseException) -> None:
        self.reason: str = error.reason if isinstance(error, NotSavedError) else " ".join(str(error).split())
        super().__init__(
            f"Could not save {what} in '{target}': {self.reason}. Nothing was written or replaced there. Free "
            "space, or choose another directory."
        )
        self.errno = getattr(error, "errno", None)
        self._made_of = what, target, error

    def __reduce__(self) -> tuple[object, ...]:
        # an OSError is made again from its message alone; a worker process sends its errors that way
        return type(self), self._made_of


@contextmanager
def saving(what: str, target: str) -> Iterator[None]:
    """Say in one line that `what` was not saved in `target` if the system, torch or safetensors cannot write it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NotSavedError(what, target, error) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _OF_TORCHS_WRITER):
            raise
        raise NotSavedError(what, target, error) from error


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
    created = _missing(target)
    staging = None
    try:
        os.makedirs(target, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=".saving-", dir=target)
        yield staging
        moved = []
        for root, _, names in os.walk(staging):
            folder = os.path.normpath(os.path.join(target, os.path.relpath(root, staging)))
            created = [*_missing(folder), *created]
            os.makedirs(folder, exist_ok=True)
            moved += [(os.path.join(root, name), os.path.join(folder, name)) for name in names]
        for _, destination in moved:
            # asked of all before the first is replaced
            if os.path.isdir(destination):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), destination)
        for source, destination in moved:
            os.replace(source, destination)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in created:
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)


def _missing(folder: str) -> list[str]:
    """The folders that making this one would make, the deepest first."""
    found, folder = [], os.path.abspath(folder)
    while not os.path.exists(folder):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found
