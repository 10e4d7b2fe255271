"""`dora-peft push`: an adapter or an export to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from ..adapters.push import Push
from ..adapters.push import push as upload
from . import common


def push(
    folder: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or what export has written.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if there is none.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="The base's repository, if the adapter's config names a folder; for --as exact, of DIR/base.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Which has to be there; main if none.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be uploaded; asks no server.")
    ] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Upload a folder in one commit, with a model card: how to load it, for an export its route, errors and command.

    README.md in the repository is replaced. Pickles, hidden files and an adapter's subfolders are not uploaded.

    Example: dora-peft push outputs/adapter user/my-adapter --dry-run
    """
    done = upload(
        folder, repository, base=base, private=private, revision=revision, message=message, create_pr=create_pr,
        dry_run=dry_run,
    )  # fmt: skip
    if as_json:
        common.print_json(done)
        return
    typer.echo("\n".join(lines(done)))


def lines(done: Push) -> list[str]:
    """For people: where to, the files with their sizes, the card if it is not yet there, notes."""
    where, width = f"{done.repository} ({done.revision})", max(map(len, done.files))
    out = [f"would push to {where}:" if done.url is None else f"pushed to {where}: {done.url}"]
    out += [f"  {name:<{width}}  {common.size(nbytes)}" for name, nbytes in done.files.items()]
    out.append(f"{len(done.files)} files, {common.size(done.nbytes)}")
    if done.url is None:
        out += ["README.md:", *(f"  {line}".rstrip() for line in done.card.splitlines())]
    return [*out, *done.notes]
