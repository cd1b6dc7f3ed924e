"""``easyedit-moe init``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import note, say
from easyedit_moe.commands.reporting import shows_progress


def init(
    model: Annotated[str, typer.Option(help="Hub name or folder; without --locate only its config is read.")],
    method: Annotated[str, typer.Option(help="Method of ours; default: Global.")] = "",
    data: Annotated[
        str, typer.Option(metavar="FACTS", help="Facts that will be edited; they decide on fact token and batch size.")
    ] = "",
    out: Annotated[str, typer.Option("--out", "-o", help="YAML file to write; without it the YAML is printed.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    locate: Annotated[
        bool,
        typer.Option(
            "--locate", help="Edit facts at windows of layers and take the best window; its rows go beside the YAML."
        ),
    ] = False,
    budget: Annotated[
        float | None, typer.Option(help="Minutes for --locate; layers are by depth where no window could be tried.")
    ] = None,
    site: Annotated[
        str, typer.Option(help="What is edited in each layer: experts, shared_expert or dense.")
    ] = "experts",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Choose hyper-parameters for a model that has none, and write why each is what it is.

    They are chosen from its config alone, in a second, or with --locate the layers by measuring.
    """
    from easyedit_moe.comparison.tuned import rows_file
    from easyedit_moe.workflow.init import init as run
    from easyedit_moe.workflow.locate_report import cost_line

    found = run(
        model, method, data or None, out or None, trust_remote_code, force, locate, budget,
        lambda costs: note(cost_line(costs, budget)), shows_progress(), site,
    )  # fmt: skip
    if not out:
        say(found.yaml().rstrip("\n"))
        return
    layers = next(one for one in found.values if one.name == "layers")
    say(f"{found.method} on {model}: layers {', '.join(map(str, layers.value))}, {layers.reason}.")
    say(found.about)
    for line in found.notes:
        note(line)
    note(f"Written: {out}" + (f", {rows_file(out)}" if locate else ""))
