"""What the verbs share: options, errors in one line, numbers for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..adapters.formats import FORMATS

AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A folder, a file, or owner/name[@revision] on the Hub.")
]
FormatOption = Annotated[
    str | None,
    typer.Option("--from", metavar="FORMAT", help=f"Instead of what the keys say, one of {', '.join(FORMATS)}."),
]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="Where norms are computed.")]
AxisOption = Annotated[
    str | None,
    typer.Option(metavar="output|input", help="What a one-dimensional dora_scale on a square layer belongs to."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Also read files of torch.save, their tensors alone.")
]
BASE_HELP = "The base model: a folder of safetensors, or owner/name[@revision]."


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """End with status 2 and one line on what a user can mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from error


@contextmanager
def progress_shown() -> Iterator[Callable[[str], None] | None]:
    """Shows the module that is being read on one line of a terminal, which is empty again at the end."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(path: str) -> None:
        sys.stderr.write(f"\r\x1b[K{path}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")


def print_json(value: Any) -> None:
    """A dataclass, or a list of them, as JSON."""
    plain = [asdict(one) for one in value] if isinstance(value, list) else asdict(value)
    typer.echo(json.dumps(plain, indent=2, default=lambda path: str(path) if isinstance(path, Path) else repr(path)))


def to_dtype(name: str | None) -> torch.dtype | None:
    """A floating point dtype by the names that people use.

    Raises:
        ValueError: There is none of this name.
    """
    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    known.update({str(dtype).removeprefix("torch."): dtype for dtype in list(known.values())})
    if name is not None and name not in known:
        raise ValueError(f"--dtype: expected one of {', '.join(known)}, found {name!r}.")
    return None if name is None else known[name]


def printable(text: str) -> str:
    """A text of a file on one line, without what a terminal would take for commands."""
    return text if text.isprintable() else repr(text)


def size(nbytes: int) -> str:
    """Bytes as people read them."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def short(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """The first names of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
