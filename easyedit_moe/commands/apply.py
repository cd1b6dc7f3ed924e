"""``easyedit-moe apply``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import say


def apply(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="File that edit wrote.")],
    model: Annotated[str, typer.Option(help="Folder of the checkpoint, a downloaded hub name, or factworld.")],
    out: Annotated[str | None, typer.Option(help="Folder for the edited checkpoint; absent or empty.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change the folder itself; the files that change are backed up in it.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write an edited checkpoint, shard by shard, without building the model; all else is byte-equal."""
    from easyedit_moe.workflow.apply import apply as run

    say(f"Written: {run(patch, model, out, in_place, trust_remote_code)}")
