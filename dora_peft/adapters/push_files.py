"""Which files of an adapter's or an export's folder go to the Hub, and what the folder is.

Pickles stay here: they can hold programs, and whoever downloads them may run these. So do hidden files and, of a
folder that no export made, subfolders: a trainer leaves its optimizer's state there. A link that leads out of the
folder is refused, as it may lead to anything.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .export.companions import check_inside
from .export.manifest import NAME as MANIFEST
from .export.record import NAME, Record, read_record
from .formats import UnreadableError, read_source
from .formats.checkpoint import CONFIG, Checkpoint
from .formats.source import CONFIG as ADAPTER_CONFIG
from .formats.source import PICKLES
from .info import Info, info

CARD = "README.md"
_KEPT = {".gitattributes"}
# The folders of the route `exact`, in the order in which a server loads them.
_PARTS = ("base", "adapter")


@dataclass(frozen=True)
class Content:
    """What a folder is.

    Attributes:
        record: Of the export that made it; None if it is an adapter as it was trained or converted.
        info: Of that adapter; None for exports.
        parts: The subfolders of an export by the route `exact`, empty for the others.
    """

    record: Record | None
    info: Info | None
    parts: tuple[str, ...] = ()


def content_of(folder: Path) -> Content:
    """Look into a folder.

    Raises:
        UnreadableError: It is none, or holds neither an adapter nor an export, or damaged files.
    """
    if not folder.exists():
        raise UnreadableError(f"There is no folder '{folder}'.")
    if not folder.is_dir():
        raise UnreadableError(f"'{folder}' is a file: expected the folder of an adapter, or what `export` has written.")
    record = read_record(folder)
    if record is not None:
        _check_whole(folder)
        return Content(record, None)
    parts = tuple(part for part in _PARTS if (folder / part / NAME).is_file())
    if not parts:
        _check_no_pickle(folder)
        return Content(None, info(folder))
    records = [read_record(folder / part) for part in parts]
    if any(found != records[0] for found in records):
        raise UnreadableError(f"'{folder}': {' and '.join(parts)} are of different exports. Push each by itself.")
    for part in parts:
        _check_whole(folder / part)
    return Content(records[0], None, parts)


def files_of(folder: Path, *, deep: bool) -> tuple[dict[str, Path], list[str]]:
    """The files to upload by their names in the repository, and a sentence for each kind of those that stay.

    Args:
        folder: The adapter's or the export's.
        deep: Whether subfolders go along.

    Raises:
        UnreadableError: A link leads out of the folder or to nothing, or an entry is no file.
    """
    found: dict[str, Path] = {}
    left: dict[str, list[str]] = {}
    for root, folders, names in os.walk(folder):
        for name in sorted(folders):
            path = Path(root) / name
            check_inside(path, folder)
            if name.startswith(".") or not deep or path.is_symlink():
                left.setdefault("folders", []).append(_relative(path, folder))
                folders.remove(name)
        for name in sorted(names):
            path, short = Path(root) / name, _relative(Path(root) / name, folder)
            if name.startswith(".") and name not in _KEPT:
                left.setdefault("hidden files", []).append(short)
                continue
            check_inside(path, folder)
            if not path.is_file():
                raise UnreadableError(f"'{path}' is {'a link to nothing' if path.is_symlink() else 'no file'}.")
            if deep and name == MANIFEST:
                # of interest only for resuming the export
                continue
            if _is_pickle(path):
                left.setdefault("made by pickle, which can hold programs", []).append(short)
            elif short != CARD:
                found[short] = path
        folders.sort()
    return found, [f"not uploaded ({what}): {', '.join(names)}" for what, names in left.items()]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _check_whole(folder: Path) -> None:
    """That the files of an export can be read: an adapter's tensors, or all that a model's index names."""
    if (folder / ADAPTER_CONFIG).is_file():
        read_source(folder)
    elif (folder / CONFIG).is_file():
        Checkpoint(folder)
    else:
        raise UnreadableError(
            f"'{folder}' has {NAME} and neither {ADAPTER_CONFIG} nor {CONFIG}: an export would. Export it again."
        )


def _check_no_pickle(folder: Path) -> None:
    """Refuse an adapter that torch.save wrote: without its tensors the others files are nothing."""
    safe = any(path.suffix == ".safetensors" for path in folder.iterdir())
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles and not safe:
        raise UnreadableError(
            f"'{folder / pickles[0]}' was made by torch.save, which can hold programs, and pickles are not uploaded. "
            f"Write it as safetensors: dora-peft convert {folder} OUT --to peft --allow-pickle."
        )


def _is_pickle(path: Path) -> bool:
    """By its name, or by what it begins with: one that is called otherwise is none the safer."""
    if path.suffix in (*PICKLES, ".pkl", ".pickle", ".joblib"):
        return True
    with path.open("rb") as file:
        head = file.read(4)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head != b"PK\x03\x04":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
