"""One archive with everything that a call on a borrowed GPU has to bring home: results, logs, compiled kernels.

results/, reproduce/   files of the folders of results that the stages wrote
triton/                Triton's cache, machine code and launchers alone, no sources, no intermediate code; in it, which
                       configurations were the fastest, and in dora_peft/ that the kernels passed their self-check
logs/, state.json      the stages' outputs, shortened, and what is done
manifest.json          device, versions, commit, sizes
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from common.files import replacing

NAME = "gpu.tar.gz"
# Machine code, its description, launchers, tuning; not .source, .ttir, .ttgir, .llir, .ptx.
CACHED = (".cubin", ".hsaco", ".json", ".so")
# torch.compile's own kernels, which its cache, not kept here, would not find again.
FOREIGN = ("triton_poi", "triton_per", "triton_red", "triton_mm", "triton_tem", "triton_for", "triton_unk")
LOG_BYTES = 20_000


def cache_files(cache: Path) -> Iterator[Path]:
    """The files of Triton's cache that a later call needs."""
    for folder in sorted(path for path in cache.glob("*") if path.is_dir()):
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in CACHED]
        if not any(path.name.removeprefix("__grp__").startswith(FOREIGN) for path in files):
            yield from files


def tuning_files(cache: Path) -> set[Path]:
    """The files in which dora_peft/ops/kernels/tuning.py has written down a fastest configuration."""
    found: set[Path] = set()
    for path in cache.glob("*/*.json"):
        try:
            if json.loads(path.read_bytes()).keys() == {"config", "key"}:
                found.add(path)
        # one that another process has just replaced, or no text at all
        except (FileNotFoundError, ValueError, AttributeError):
            continue
    return found


def portable(path: Path) -> bytes:
    """A cached file's content, without the folder where a group's files lie."""
    content = path.read_bytes()
    if path.name.startswith("__grp__"):
        group = json.loads(content)
        group["child_paths"] = {
            name: Path(child).name for name, child in group["child_paths"].items() if Path(child).suffix in CACHED
        }
        content = json.dumps(group).encode()
    return content


def placed(content: bytes, target: Path) -> bytes:
    """The other way round: a group's files lie beside it."""
    group = json.loads(content)
    group["child_paths"] = {name: str(target.parent / child) for name, child in group["child_paths"].items()}
    return json.dumps(group).encode()


def shortened(path: Path) -> bytes:
    """A log's beginning and end."""
    content = path.read_bytes()
    if len(content) <= LOG_BYTES:
        return content
    half = LOG_BYTES // 2
    return content[:half] + b"\n[...]\n" + content[-half:]


def write_archive(
    path: Path,
    results: Mapping[str, Iterable[Path]],
    work: Path,
    cache: Path,
    manifest: Mapping[str, Any],
) -> dict[str, int]:
    """Write all of it, whole or not at all.

    Args:
        results: Files by the folder that they get in the archive, "results" or "reproduce".
        work: Folder of logs/ and state.json.
        cache: Triton's.

    Returns:
        The bytes of each folder, uncompressed, and of the "archive".
    """
    entries: dict[str, bytes] = {}
    for folder, files in results.items():
        entries |= {f"{folder}/{file.name}": file.read_bytes() for file in files}
    entries |= {f"triton/{file.parent.name}/{file.name}": portable(file) for file in cache_files(cache)}
    entries |= {f"logs/{log.name}": shortened(log) for log in sorted((work / "logs").glob("*"))}
    entries |= {file.name: file.read_bytes() for file in sorted(work.glob("*.json*")) if file.is_file()}
    sizes: dict[str, int] = {}
    for name, content in entries.items():
        folder = name.partition("/")[0] if "/" in name else "state"
        sizes[folder] = sizes.get(folder, 0) + len(content)
    entries["manifest.json"] = json.dumps({**manifest, "bytes": sizes}, indent=2).encode()
    with replacing(path) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return sizes | {"archive": path.stat().st_size}


def read_archive(path: Path, results: Path, reproduction: Path, work: Path, cache: Path) -> dict[str, list[str]]:
    """Put an archive's files where the next call, and the README's table, look for them.

    Returns:
        The names of the files by folder.

    Raises:
        ValueError: It is no such archive, or names a place outside of these folders.
    """
    places = {"results": results, "reproduce": reproduction, "triton": cache}
    found: dict[str, list[str]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            entries = [(entry, archive.extractfile(entry)) for entry in archive if entry.isfile()]
            contents = [(PurePosixPath(entry.name), file.read()) for entry, file in entries if file is not None]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an archive of scripts/gpu.sh: {error}") from error
    if not any(str(name) == "manifest.json" for name, _ in contents):
        raise ValueError(f"{path} is not an archive of scripts/gpu.sh: it has no manifest.json")
    for name, _ in contents:
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{path} names a file outside of its folders: {name}")
    for name, content in contents:
        folder = name.parts[0] if len(name.parts) > 1 else ""
        inside = name.relative_to(folder) if folder in places else name
        target = places.get(folder, work) / inside
        if folder == "triton" and target.name.startswith("__grp__"):
            content = placed(content, target)
        with replacing(target) as temporary:
            temporary.write_bytes(content)
        found.setdefault(folder or "state", []).append(str(inside))
    return found
