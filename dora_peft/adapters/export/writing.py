"""A new checkpoint made of an old one, file by file, so that it can be interrupted at any time and go on later.

Everything is made in `OUT.partial`: each file of tensors under another name, which is synced, renamed, and then entered
in the manifest (manifest.py). A run that finds a folder with the same inputs goes on after its finished files. One
rename at the end makes it `OUT`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..formats import Checkpoint
from ..formats.checkpoint import CONFIG, INDEX, Entry
from .companions import check_inside, companions
from .manifest import NAME, Finished, Manifest, describe, read_manifest, sync_folder, write_synced
from .shards import ENTRY_BYTES, ShardWriter, read_head

try:
    import fcntl
except ImportError:
    # Windows: nothing tells that two runs write the same folder
    fcntl = None  # type: ignore[assignment]

Report = Callable[[str], None]
SINGLE = "model.safetensors"
# What quantised weights are stored in; indices and masks are of other dtypes.
_CODES = {torch.uint8, torch.int8, torch.int32, torch.uint32, torch.uint16}


@dataclass(frozen=True)
class Piece:
    """Some tensors of the new files made from some of the old ones.

    Attributes:
        keys: Of the old files, which it replaces; none if the tensors are new. All are written to the first one's file.
        make: The new tensors by their keys; called when their file is written.
        nbytes: Of the new tensors, for the plan and for free disk space.
    """

    keys: tuple[str, ...]
    make: Callable[[], dict[str, Tensor]]
    nbytes: int


class NotWrittenError(OSError):
    """A checkpoint could not be written; there is none at its place, and what is finished can be gone on from."""


@dataclass
class _Shard:
    """One new file: its name, what is copied or made for it, in order."""

    name: str
    parts: list[str | Piece] = field(default_factory=list)
    nbytes: int = 0


def write_model(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    pieces: Sequence[Piece],
    *,
    dtype: torch.dtype | None,
    config: Mapping[str, object],
    options: Mapping[str, str],
    subfolder: str = "",
    finish: Callable[[Path], list[Path]] | None = None,
    force: bool = False,
    progress: Report | None = None,
) -> list[Path]:
    """Write a checkpoint with some tensors made anew and the others copied, with all that goes along with the weights.

    Args:
        checkpoint: The old one.
        out: The folder to write.
        pieces: What is made anew.
        dtype: Of the tensors that are copied, where they are floating point and no part of a quantised weight; as they
            are if None.
        config: The new config.json.
        options: What a run must share with the one that it goes on after, besides the base, such as the adapter's hash.
        subfolder: Where in `out` the model goes.
        finish: Called with the unfinished folder when the model is in it, to write what belongs to it; gives its files.
        force: Replace a model at `out`, and an unfinished one that was made of something else.
        progress: Called with the key of each tensor that is written.

    Returns:
        The files in `out`.

    Raises:
        UnreadableError: A link leads out of the base's folder, or a number is too large for `dtype`.
        FileExistsError: Something is at `out`, or an unfinished export of something else beside it.
        NotWrittenError: The disk is full, or the system cannot write. There is nothing at `out` then.
    """
    target, partial = places(Path(out), checkpoint.folder, subfolder, force=force)
    shards = _plan(checkpoint, pieces, dtype)
    for name in checkpoint.files():
        check_inside(checkpoint.folder / name, checkpoint.folder)
    along = companions(checkpoint.folder, config)
    plan = repr([(s.name, [p if isinstance(p, str) else (p.keys, p.nbytes) for p in s.parts]) for s in shards])
    texts = {**options, "dtype": str(dtype)}
    wanted = describe([checkpoint.folder / name for name in checkpoint.files()], config, texts, plan)
    with _said_where(target, partial), _begun(partial, wanted, force=force) as manifest:
        folder = partial / subfolder
        folder.mkdir(exist_ok=True)
        left = [shard for shard in shards if not _is_whole(folder, shard, manifest)]
        along_bytes = sum(path.stat().st_size for path in along.values())
        _check_space(partial, sum(shard.nbytes for shard in left) + along_bytes)
        for shard in left:
            manifest.shards[shard.name] = _write_shard(checkpoint, folder, shard, dtype, progress)
            manifest.write(partial)
        _write_rest(folder, shards, config, along)
        others: list[Path] = [] if finish is None else [path.relative_to(partial) for path in finish(partial)]
        _put(partial, target)
    names = [shard.name for shard in shards] + ([INDEX] if len(shards) > 1 else [])
    model = [Path(subfolder) / name for name in (*names, CONFIG, *along)]
    return [target / path for path in (*model, *others, Path(NAME))]


def places(out: Path, base: Path, subfolder: str = "", *, force: bool = False) -> tuple[Path, Path]:
    """Where the model is going to be, and where it is made; nothing is written.

    Raises:
        FileExistsError: Something is there, and `force` is not set, or it is no model, or the base itself.
        ValueError: It lies below a file.
    """
    target = out.absolute()
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"'{out}' cannot be made: '{above}' is no folder. Choose another name.")
    if base.resolve().is_relative_to(target.resolve()):
        raise FileExistsError(f"'{out}' holds the base model, which is read while it is written. Choose another name.")
    taken = target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir())))
    if taken and not force:
        raise FileExistsError(f"'{out}' is there already. Choose another name, or pass --force to replace it.")
    # a model that was downloaded or trained has no manifest
    if taken and (target.is_symlink() or not (target / NAME).is_file() or not _is_model(target / subfolder)):
        raise FileExistsError(f"'{out}' is no export: --force replaces exports alone. Choose another name.")
    return target, target.with_name(f"{target.name}.partial")


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


def _plan(checkpoint: Checkpoint, pieces: Sequence[Piece], dtype: torch.dtype | None) -> list[_Shard]:
    """The new files, named as the old ones."""
    owners: dict[str, Piece] = {}
    for piece in pieces:
        for key in piece.keys:
            if key not in checkpoint.entries or key in owners:
                raise ValueError(f"'{key}' should be replaced, and {'is by two' if key in owners else 'is not there'}.")
            owners[key] = piece
    shards = {name: _Shard(name) for name in checkpoint.files()}
    quantised = _quantised(checkpoint.entries)
    for key, entry in checkpoint.entries.items():
        shard, owner = shards[entry.file], owners.get(key)
        if owner is None:
            shard.parts.append(key)
            shard.nbytes += _nbytes(entry, None if key in quantised else dtype) + ENTRY_BYTES + len(key)
        elif key == owner.keys[0]:
            _add(shard, owner)
    for piece in pieces:
        if not piece.keys:
            _add(list(shards.values())[-1], piece)
    written = [shard for shard in shards.values() if shard.parts]
    if len(written) == 1:
        written[0].name = SINGLE
    return written


def _add(shard: _Shard, piece: Piece) -> None:
    shard.parts.append(piece)
    shard.nbytes += piece.nbytes + sum(ENTRY_BYTES + len(key) for key in piece.keys)


def _nbytes(entry: Entry, dtype: torch.dtype | None) -> int:
    casts = dtype is not None and entry.dtype is not None and entry.dtype.is_floating_point
    return entry.nbytes // entry.dtype.itemsize * dtype.itemsize if casts else entry.nbytes  # type: ignore[union-attr]


def _quantised(entries: Mapping[str, Entry]) -> set[str]:
    """The keys that are part of a quantised weight: codes, and what lies beside them or below, but for biases."""
    codes = {
        key for key, entry in entries.items()
        if entry.dtype is None or entry.dtype in _CODES or (entry.dtype.is_floating_point and entry.dtype.itemsize == 1)
        # GPT-2's causal mask is none
        if not key.endswith(".bias")
    }  # fmt: skip
    stems = {stem for key in codes for stem in (key, key.rpartition(".")[0])}
    found = set(codes)
    for key in entries:
        parts = key.split(".")
        below = (".".join(parts[:count]) for count in (len(parts) - 1, len(parts) - 2))
        if parts[-1] != "bias" and any(stem in stems for stem in below):
            found.add(key)
    return found


def _write_shard(
    checkpoint: Checkpoint, partial: Path, shard: _Shard, dtype: torch.dtype | None, progress: Report | None
) -> Finished:
    """Write one file under another name, and rename it when it is on the disk."""
    temporary = partial / f"{shard.name}.tmp"
    quantised = _quantised(checkpoint.entries)
    keys = [key for part in shard.parts for key in ([part] if isinstance(part, str) else part.keys)]
    # what a piece makes is not known yet; new keys are about as long as old ones
    count = 4 * len(keys) + 64 * sum(isinstance(part, Piece) for part in shard.parts)
    length = max((len(json.dumps(key)) for key in keys), default=0) + 64
    metadata = {**checkpoint.metadata, "format": "pt"}
    try:
        with ShardWriter(temporary, count * length, count, metadata) as writer:
            for part in shard.parts:
                if isinstance(part, str):
                    cast = part not in quantised and checkpoint.entries[part].dtype is not None
                    made = {part: checkpoint.tensor(part)}
                    to = dtype if cast and made[part].is_floating_point() else None
                else:
                    made, to = part.make(), None
                for key in list(made):
                    if progress is not None:
                        progress(key)
                    writer.add(key, made.pop(key), to)
            nbytes, digest = writer.finish()
        os.replace(temporary, partial / shard.name)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(partial)
    return Finished(nbytes, digest)


def _is_whole(partial: Path, shard: _Shard, manifest: Manifest) -> bool:
    """Whether an earlier run finished a file, which is as it was written."""
    finished = manifest.shards.get(shard.name)
    if finished is not None and finished.is_that_of(partial / shard.name):
        return True
    manifest.shards.pop(shard.name, None)
    return False


def _write_rest(partial: Path, shards: list[_Shard], config: Mapping[str, object], along: Mapping[str, Path]) -> None:
    """The index if there is more than one file, the config, and what is copied."""
    heads = {shard.name: read_head(partial / shard.name) for shard in shards}
    where = {key: name for name, head in heads.items() for key in head}
    if len(where) < sum(map(len, heads.values())):
        twice = next(key for name, head in heads.items() for key in head if where[key] != name)
        raise ValueError(f"'{twice}' was written to two files.")
    if len(shards) > 1:
        total = sum(stop - start for head in heads.values() for start, stop in head.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_synced(partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    for name, path in along.items():
        (partial / name).parent.mkdir(exist_ok=True)
        write_synced(partial / name, path.read_bytes())
    write_synced(partial / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


@contextmanager
def _begun(partial: Path, wanted: Manifest, *, force: bool) -> Iterator[Manifest]:
    """The manifest of the unfinished export in `partial`, or a new one; no other run writes there meanwhile.

    Raises:
        FileExistsError: It was begun with other inputs, or is no export, or another run is at work on it.
    """
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"'{partial}' is no folder. Remove it, or choose another name.")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        found = read_manifest(partial)
        if found is None and {path.name for path in partial.iterdir()} - {f"{NAME}.tmp"}:
            raise FileExistsError(f"'{partial}' is no unfinished export. Remove it, or choose another name.")
        other = None if found is None else wanted.difference(found)
        if other is not None and not force:
            raise FileExistsError(
                f"'{partial}' was begun with another {other or 'program'}. Remove the folder, or pass --force to "
                "begin anew."
            )
        if found is None or other is not None:
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            found = wanted
            found.write(partial)
        for entry in partial.rglob("*.tmp"):
            entry.unlink()
        try:
            yield found
        finally:
            # a finished folder is at its place by now, and has some
            if not found.shards:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keep other runs out, where the system can; a run that is killed lets go."""
    if fcntl is None:
        yield
        return
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"Another run is writing '{partial}'. Wait until it ends.") from None
        yield
    finally:
        os.close(handle)


def _check_space(partial: Path, nbytes: int) -> None:
    free = shutil.disk_usage(partial).free
    if nbytes > free:
        raise OSError(f"{nbytes / 2**20:.1f} MiB are needed, and {free / 2**20:.1f} MiB are free")


@contextmanager
def _said_where(target: Path, partial: Path) -> Iterator[None]:
    """Say in one line what is there after the system refused to write."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        begun = f"What is finished is in '{partial}': run the same command again to go on, or remove it. "
        raise NotWrittenError(
            f"Could not write '{target}': {' '.join(str(error).split())}. Nothing was written or replaced there. "
            f"{begun * partial.exists()}Free space, or choose another folder."
        ) from error


def _put(partial: Path, target: Path) -> None:
    """Rename the finished folder, over an empty one or in the place of an old model."""
    old = target.with_name(f".{target.name}.replaced")
    if target.exists() and any(target.iterdir()):
        # of a run that was killed when it had put its own in place
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(partial, target)
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)
