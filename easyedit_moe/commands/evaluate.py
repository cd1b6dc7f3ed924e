"""``easyedit-moe evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.compare import split_names
from easyedit_moe.commands.printing import note, say, show_table
from easyedit_moe.commands.reporting import shows_progress


def evaluate(
    model: options.Model = "factworld",
    patch: options.Patches = None,
    data: Annotated[
        str, typer.Option(help="File of records (.json, .jsonl, .csv, .tsv); factworld and factworld-easyedit ship.")
    ] = "",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, separated by commas; need: pip install 'easyedit-moe\\[eval]'."
        ),
    ] = None,
    tasks_dir: Annotated[str | None, typer.Option(help="Folder of tasks of your own; works offline.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task; default: all.")] = None,
    chat: options.Chat = None,
    protocol: options.Protocol = "",
    out: Annotated[str, typer.Option(help="Folder for results.json and table.md; default: only shown.")] = "",
    dtype: options.PatchDType = "",
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Score records and general ability before and after a patch, in one table."""
    from rich.table import Table

    from easyedit_moe.comparison.report import check_folder
    from easyedit_moe.workflow.evaluate import evaluate as run
    from easyedit_moe.workflow.evaluation_report import COLUMNS, TEXTS, cells, notes, write_evaluation

    if out:
        check_folder(out)
    result = run(
        model, patch or [], data or None, split_names(tasks or []), tasks_dir, limit,
        options.loading_of(dtype, device, trust_remote_code), shows_progress(), chat,
        protocol or None,
    )  # fmt: skip
    paths = write_evaluation(result, out) if out else []
    table = Table()
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < TEXTS else "right")
    for measure in result.measures:
        table.add_row(*cells(measure))
    show_table(table)
    protocol = result.provenance.get("protocols", {}).get("records")
    if protocol:
        say(f"Records: {protocol}.")
    for line in notes(result):
        say(line)
    if paths:
        note("Written: " + ", ".join(str(path) for path in paths))
