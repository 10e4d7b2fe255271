"""All verbs under one name."""

from __future__ import annotations

import sys

import typer

from . import convert, doctor, export, info, push
from .common import said_in_one_line

app = typer.Typer(
    help="DoRA adapters: what is in them, what is wrong with them, other tools' formats, and what servers take.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("push")(push.push)


def main() -> None:
    """The console script: 0 if all is well, 1 if `doctor` found something, 2 if a verb could not do its work."""
    with said_in_one_line():
        sys.exit(app(standalone_mode=True))
