"""`dora-peft doctor`: what is wrong with an adapter that loads without an error."""

from __future__ import annotations

from typing import Annotated

import typer

from ..adapters import doctor as examine
from . import common


def doctor(
    adapter: common.AdapterArgument,
    base: Annotated[str, typer.Option(metavar="MODEL", help=common.BASE_HELP)],
    source_format: common.FormatOption = None,
    device: common.DeviceOption = "cpu",
    axis: common.AxisOption = None,
    as_json: common.JsonOption = False,
    allow_pickle: common.PickleOption = False,
) -> None:
    """Look for every silent failure that is known, and say what to do about each.

    Ends with status 0 if there is none, 1 if there are some, 2 if the files cannot be read.

    Example: dora-peft doctor outputs/adapter --base models/llama
    """
    with common.progress_shown() as progress:
        findings = examine(
            adapter, base, source_format=source_format, device=device, axis=axis, allow_pickle=allow_pickle,
            progress=progress,
        )  # fmt: skip
    if as_json:
        common.print_json(findings)
    elif not findings:
        typer.echo("nothing found")
    else:
        for finding in findings:
            typer.echo(f"{finding.name}: {finding.found}")
            if finding.modules:
                typer.echo(f"  in       {common.short(finding.modules)}")
            typer.echo(f"  to mend  {finding.mend}")
    raise typer.Exit(1 if findings else 0)
