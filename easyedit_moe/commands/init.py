"""``easyedit-moe init``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.tables import note, say


def init(
    model: Annotated[str, typer.Option(help="Hub name or folder; only its config is read.")],
    method: Annotated[str, typer.Option(help="Method of ours; default: Global.")] = "",
    data: Annotated[
        str, typer.Option(metavar="FACTS", help="Facts that will be edited; they decide on fact token and batch size.")
    ] = "",
    out: Annotated[str, typer.Option("--out", "-o", help="YAML file to write; without it the YAML is printed.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Choose hyper-parameters for a model that has none, from its config alone, and write why each is what it is."""
    from easyedit_moe.workflow.init import init as run

    found = run(model, method, data or None, out or None, trust_remote_code, force)
    if not out:
        say(found.yaml().rstrip("\n"))
        return
    layers = next(one for one in found.values if one.name == "layers")
    say(f"{found.method} on {model}: layers {', '.join(map(str, layers.value))}, {layers.reason}.")
    say(found.about)
    for line in found.notes:
        note(line)
    note(f"Written: {out}")
