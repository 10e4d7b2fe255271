"""`dora-peft info`: what an adapter's files hold."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import typer

from ..adapters import info as read_info
from ..adapters.info import Info, ModuleInfo
from . import common


def info(
    adapter: common.AdapterArgument,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help=common.BASE_HELP)] = None,
    source_format: common.FormatOption = None,
    device: common.DeviceOption = "cpu",
    axis: common.AxisOption = None,
    as_json: common.JsonOption = False,
    allow_pickle: common.PickleOption = False,
) -> None:
    """Say what an adapter holds: its format, base, ranks, alphas, dtypes and size.

    With --base also how far each module's magnitudes are from the base's norms.

    Example: dora-peft info outputs/adapter --base models/llama
    """
    with common.progress_shown() as progress:
        found = read_info(
            adapter, base=base, source_format=source_format, device=device, axis=axis, allow_pickle=allow_pickle,
            progress=progress,
        )  # fmt: skip
    if as_json:
        common.print_json(found)
    else:
        typer.echo("\n".join(lines(found)))


def lines(found: Info) -> list[str]:
    """For people: one line for all modules of a name, rank, alpha and dtypes."""
    out = [
        f"format    {found.format}",
        f"file      {found.path}",
        f"base      {common.printable(found.base or 'not named')}",
        f"size      {common.size(found.nbytes)}",
        f"modules   {len(found.modules)}",
    ]
    groups: dict[tuple[object, ...], list[ModuleInfo]] = defaultdict(list)
    for module in found.modules:
        name = module.path.rpartition(".")[2]
        groups[name, module.shape, module.rank, module.alpha, module.dtypes].append(module)
    width = max((len(str(name)) for name, *_ in groups), default=0)
    for (last, shape, rank, alpha, _), members in groups.items():
        names = ("A", "B", "m")
        dtypes = ", ".join(f"{n} {d}" for n, d in zip(names, members[0].dtypes, strict=False))
        changes = [module.change for module in members if module.change is not None]
        change = f", mean |m / ||W0|| - 1| {sum(changes) / len(changes):.2e}" if changes else ""
        no_m = "" if len(members[0].dtypes) == 3 else ", no magnitude"
        assert isinstance(shape, tuple)
        out.append(
            f"  {last!s:<{width}}  {len(members)} x [{shape[0]}, {shape[1]}], rank {rank}, alpha {alpha:g}, "
            f"{dtypes}{no_m}{change}"
        )
    if found.others:
        out.append(f"others    {common.short(found.others)}")
    return [*out, *(f"note      {note}" for note in found.notes)]
