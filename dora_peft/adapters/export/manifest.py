"""What an unfinished export was made of, and which of its files are whole: manifest.json in its folder.

A base is told by the sizes and times of its files, their heads, and samples of every tensor: hashing all of 140 GB
reads them twice, and takes minutes each time an export is resumed. Another model of the same architecture differs in
every sample; a file changed in place differs in its time. What is asked for is compared in full.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..formats.source import read_json
from .shards import digest_of, read_head

NAME = "manifest.json"
# Hashed at the start, in the middle and at the end of each tensor.
SAMPLE_BYTES = 4096
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "dora-peft")


@dataclass(frozen=True)
class Finished:
    """A file that is whole: its size, and `digest_of` it."""

    nbytes: int
    digest: str

    def is_that_of(self, path: Path) -> bool:
        """Whether this file is still as it was written."""
        return path.is_file() and path.stat().st_size == self.nbytes and digest_of(path) == self.digest


@dataclass
class Manifest:
    """Of one export.

    Attributes:
        inputs: What it is made of, a text by name.
        shards: The finished files.
    """

    inputs: dict[str, str]
    shards: dict[str, Finished] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replace the file in `folder`, which is whole at any time."""
        shards = {name: asdict(shard) for name, shard in sorted(self.shards.items())}
        text = json.dumps({"inputs": self.inputs, "shards": shards}, indent=2) + "\n"
        write_synced(folder / NAME, text.encode())

    def difference(self, other: Manifest) -> str | None:
        """Which input of another one differs, None if none does."""
        names = dict.fromkeys([*self.inputs, *other.inputs])
        return next((name for name in names if self.inputs.get(name) != other.inputs.get(name)), None)


def read_manifest(folder: Path) -> Manifest | None:
    """That of a folder, None if it holds none.

    Raises:
        UnreadableError: It is no JSON object.
    """
    found = read_json(folder / NAME)
    if found is None:
        return None
    inputs, shards = found.get("inputs"), found.get("shards")
    if not isinstance(inputs, dict) or not isinstance(shards, dict):
        return Manifest({"": "another program's"})
    try:
        whole = {str(name): Finished(shard["nbytes"], shard["digest"]) for name, shard in shards.items()}
    except (TypeError, KeyError):
        return Manifest({"": "another program's"})
    return Manifest({str(name): str(text) for name, text in inputs.items()}, whole)


def describe(files: Iterable[Path], config: Mapping[str, object], options: Mapping[str, str], plan: str) -> Manifest:
    """The manifest of an export that has not begun.

    Args:
        files: The base's files of tensors.
        config: The config that is going to be written.
        options: What was asked for, and hashes of the adapters.
        plan: Which tensors go into which file.
    """
    inputs = {f"base's {path.name}": _describe_file(path) for path in files}
    inputs.update({f"option {name}": text for name, text in options.items()})
    inputs["config"] = _digest(json.dumps(config, sort_keys=True, default=str).encode())
    inputs.update({f"version of {name}": _version(name) for name in _PACKAGES})
    inputs["plan"] = _digest(plan.encode())
    return Manifest(inputs)


def digest_files(files: Iterable[Path]) -> str:
    """Of names and whole contents of small files, such as an adapter's."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name} {_digest(path.read_bytes())}\n".encode())
    return whole.hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file through another name, so that after a loss of power it is whole or as before."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system lets a program wait for them."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _describe_file(path: Path) -> str:
    """Size, time, head and samples of a safetensors file."""
    found, digest = path.stat(), hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(int.from_bytes(file.read(8), "little")))
        for start, stop in read_head(path).values():
            for at in (start, (start + stop) // 2, max(start, stop - SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(min(SAMPLE_BYTES, stop - at)))
    return f"{found.st_size} bytes, changed at {found.st_mtime_ns} ns, samples {digest.hexdigest()}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # run from a checkout that is not installed
        return "unknown"
