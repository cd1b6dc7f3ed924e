"""``easyedit-moe revert``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import say


def revert(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="File that edit wrote.")],
    model: Annotated[str, typer.Option(help="Folder of the edited checkpoint; it is left as it is.")],
    out: Annotated[str, typer.Option(help="Folder for the checkpoint without the patch; absent or empty.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint before the patch; default: the originals in the patch or in a backup of the folder."
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write the checkpoint without a patch, byte for byte as it was before."""
    from easyedit_moe.workflow.revert import revert as run

    say(f"Written: {run(patch, model, out, base, trust_remote_code)}")
