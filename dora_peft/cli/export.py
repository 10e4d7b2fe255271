"""`dora-peft export`: what servers that do not know DoRA take."""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from ..adapters.export import NAMED, Record
from ..adapters.export import export as write_exported
from . import common


def export(
    adapter: common.AdapterArgument,
    base: Annotated[str, typer.Option(metavar="MODEL", help=f"{common.BASE_HELP[:-1]}, or a .gguf.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to write; the file, for --to gguf.")],
    route: Annotated[str, typer.Option("--as", metavar="exact|lora|merged", help="See above.")],
    more: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER", help="Another one over it, in the order of activity; repeatable."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="fp32|fp16|bf16", help="Of what is written: fp16, but for merged that of the base."),
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Of --as lora: one of vLLM's ranks.")] = None,
    error: Annotated[
        float | None,
        typer.Option(metavar="E", help="Of --as lora: the smallest rank whose error is at most E of the update."),
    ] = None,
    to: Annotated[str, typer.Option(metavar="peft|gguf", help="Of --as lora: a folder, or llama.cpp's file.")] = "peft",
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of --as lora: a file of texts to weight the fit by.")
    ] = None,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Weight by whole second moments, one layer at a time.")
    ] = False,
    base_quantization: Annotated[
        str | None,
        typer.Option(metavar="|".join(NAMED), help="How the base was quantised in training, if the folder errs."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Of --as exact: write a quantised base in floating point.")
    ] = False,
    device: common.DeviceOption = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only measure, and say what would be lost.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export at DIR.")] = False,
    as_json: common.JsonOption = False,
    allow_pickle: common.PickleOption = False,
) -> None:
    """Write what servers that do not know DoRA take, and say what is lost.

    --as exact   DIR/base with rows c W0 and DIR/adapter, a plain LoRA c s B A: exact up to rounding of W0.
    --as lora    the nearest plain LoRA over the base as it is: approximate.
    --as merged  a base with the merged weights, written file by file.

    Of a base that is a .gguf, --as exact writes DIR/base.gguf and DIR/adapter.gguf for llama.cpp.

    Example: dora-peft export outputs/adapter --base models/llama --out served --as exact
    """
    with common.progress_shown() as progress:
        record = write_exported(
            [adapter, *(more or [])], base, out, route, dtype=common.to_dtype(dtype), rank=rank, error=error, to=to,
            calibration=calibration, covariance=covariance, base_quantization=base_quantization,
            dequantize=dequantize, device=device,
            force=force, dry_run=dry_run, allow_pickle=allow_pickle, progress=progress,
            command=shlex.join(["dora-peft", *sys.argv[1:]]),
        )  # fmt: skip
    if as_json:
        common.print_json(record)
        return
    typer.echo("\n".join(lines(record, out, dry_run)))


def lines(record: Record, out: str, dry_run: bool) -> list[str]:
    """For people: how exact it is, numbers of all modules together and of those of each name, warnings and notes."""
    found = [f"{'would write' if dry_run else 'wrote'} {out}: {len(record.modules)} modules in {record.dtype}"]
    found.append(record.statement)
    found += [f"{name.replace('_', ' '):<18} {value:.4g}" for name, value in record.totals.items()]
    by_name: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for path, own in record.modules.items():
        by_name[path.rpartition(".")[2]].append(own)
    width = max(map(len, by_name), default=0)
    for name, members in by_name.items():
        said = [f"error / update {_span([own['error_over_update'] for own in members])}"]
        if "share_lost" in members[0]:
            said.append(f"c lost in {_span([100 * own['share_lost'] for own in members])} % of rows")
        found.append(f"  {name:<{width}}  {len(members)} modules: {', '.join(said)}")
    return [*found, *(f"warning: {said}" for said in record.warnings()), *record.notes]


def _span(values: Sequence[float]) -> str:
    """One number, or the least and the largest."""
    least, most = f"{min(values):.2g}", f"{max(values):.2g}"
    return least if least == most else f"{least} to {most}"
