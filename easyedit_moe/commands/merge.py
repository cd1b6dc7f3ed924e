"""``easyedit-moe merge``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands.printing import say


def merge(
    patches: Annotated[list[str], typer.Argument(metavar="PATCH...", help="Files, in the order of their edits.")],
    out: Annotated[str, typer.Option(help="File for the one patch; it must not exist.")],
    fold: Annotated[
        bool, typer.Option(help="One update per layer: smaller where patches are many, the same up to rounding.")
    ] = False,
) -> None:
    """Make one patch of a chain: it gives the bits that applying all in order gives (with --fold, up to rounding)."""
    from easyedit_moe.workflow.merge import merge as run

    say(f"Written: {out}, patch {run(patches, out, fold).id}")
