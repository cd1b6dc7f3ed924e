"""``easyedit-moe tables``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands import compare_options, options
from easyedit_moe.commands.compare import brief, read_seeds, split_names
from easyedit_moe.commands.printing import note, say, show_rows
from easyedit_moe.commands.reporting import shows_progress

Names = Annotated[list[str], typer.Argument(metavar="TABLE...", help="Of 1, 2, 4, 5, 6 and ablations.")]
ZsRE = Annotated[
    str | None, typer.Option(help="File of ZsRE for table 1; without it that table has CounterFact alone.")
]
Folder = Annotated[
    str | None, typer.Option(help="Folder of <METHOD>/<model>.yaml; methods that it lacks have those that ship.")
]
Skip = Annotated[int, typer.Option(help="Records of --data to leave out at the start.")]
Out = Annotated[str, typer.Option(help="Folder: tables.md, and results.json, table.md and a chart for each table.")]


def tables(
    names: Names,
    model: options.Model = "factworld",
    data: compare_options.Data = "factworld",
    zsre: ZsRE = None,
    edits: compare_options.Edits = 100,
    batch_size: compare_options.BatchSize = 50,
    hparams: Folder = None,
    out: Out = "results/tables",
    seeds: compare_options.Seeds = "",
    resume: compare_options.Resume = False,
    settings: options.Settings = None,
    stats_dir: options.StatsDir = "",
    dtype: compare_options.DType = "",
    device: options.Device = "",
    skip: Skip = 0,
) -> None:
    """Make tables of the MoTE paper on any model and data, with published figures beside ours where all is the same."""
    from easyedit_moe.comparison.paper_report import about, header, lines, notes
    from easyedit_moe.workflow.tables import tables as run

    given = options.settings_of(settings, stats_dir=stats_dir, dtype=dtype, device=device)
    made = run(
        split_names(names), model, data, zsre, edits, batch_size, hparams, out, resume, given, read_seeds(seeds),
        lambda row: note(f"{row.method}: {brief(row)}"), shows_progress(), skip,
    )  # fmt: skip
    for one in made:
        say(about(one.table, one.comparison))
        show_rows(header(one.table, one.comparison), lines(one.table, one.comparison))
        for line in notes(one.table, one.comparison):
            say(line)
    note(f"Written: {out}/tables.md, and " + ", ".join(str(path) for one in made for path in one.files))
