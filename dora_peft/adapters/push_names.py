"""What is uploaded under another name than here: a folder of this machine is no name for others, and tells of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .export.record import Record
from .formats.source import CONFIG, read_json
from .push_card import on_hub

_BASE = "base_model_name_or_path"


def for_others(record: Record) -> Record:
    """A record in which folders of this machine are called by the last part of their path.

    Args:
        record: As `export` wrote it.
    """
    return replace(
        record,
        base=_short(record.base),
        adapters=[_short(one) for one in record.adapters],
        command=None if record.command is None else _short_command(record.command),
    )


def renamed(files: Mapping[str, Path], base: str | None, *, beside: bool) -> tuple[dict[str, bytes], list[str]]:
    """The configs of adapters that are uploaded in another form, and what a reader should know.

    Args:
        files: Those to upload, by their names in the repository.
        base: What the base is called there; what the configs say if None, unless that is a folder.
        beside: Whether the base is uploaded as well, to base/ beside the adapter.
    """
    found, notes = {}, []
    for name, file in files.items():
        config = read_json(file) if Path(name).name == CONFIG else None
        if config is None:
            continue
        named = str(config.get(_BASE) or "")
        new = base or on_hub(named)
        left_out = new is None and bool(named)
        if left_out or (base is not None and named != base):
            found[name] = (json.dumps({**config, _BASE: new}, indent=2) + "\n").encode()
        if left_out:
            mend = "it is base/ beside it" if beside else "pass --base"
            notes.append(f"{name} names its base '{named}', which is no owner/name on the Hub and left out: {mend}")
    return found, notes


def _short(name: str) -> str:
    return name if on_hub(name) is not None else Path(name).name or name


def _short_command(command: str) -> str | None:
    """A command with the last parts of its paths; None if it cannot be read."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    short = [_short_word(word) for word in words]
    return command if short == words else shlex.join(short)


def _short_word(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{_short(value)}" if "/" in value else word
