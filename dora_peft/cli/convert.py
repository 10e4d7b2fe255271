"""`dora-peft convert`: an adapter in another tool's format."""

from __future__ import annotations

from typing import Annotated

import typer

from ..adapters import TARGETS
from ..adapters import convert as write_converted
from . import common


def convert(
    adapter: common.AdapterArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write; or one .safetensors file.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"One of {', '.join(TARGETS)}.")],
    source_format: common.FormatOption = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help=common.BASE_HELP)] = None,
    dtype: Annotated[str | None, typer.Option(metavar="fp32|fp16|bf16", help="Of the tensors written.")] = None,
    device: common.DeviceOption = "cpu",
    axis: common.AxisOption = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit norms per output row to norms per input column.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")] = False,
    as_json: common.JsonOption = False,
    allow_pickle: common.PickleOption = False,
) -> None:
    """Write an adapter in another tool's format; --to dora makes a DoRA of a plain LoRA, with the same outputs.

    Example: dora-peft convert outputs/adapter converted --to mlx
    """
    with common.progress_shown() as progress:
        done = write_converted(
            adapter, out, to, source_format=source_format, base=base, dtype=common.to_dtype(dtype), device=device,
            axis=axis, refit=refit, dry_run=dry_run, force=force, allow_pickle=allow_pickle, progress=progress,
        )  # fmt: skip
    if as_json:
        common.print_json(done)
        return
    typer.echo(f"{done.source} -> {done.target}: {done.modules} modules, {common.size(done.nbytes)}")
    for path in done.files:
        typer.echo(f"{'would write' if dry_run else 'wrote'} {path}")
    if dry_run:
        typer.echo(f"free there: {common.size(done.free)}")
    for note in done.notes:
        typer.echo(note)
