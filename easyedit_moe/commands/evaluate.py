"""``easyedit-moe evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands.compare import split_names
from easyedit_moe.commands.reporting import errors_reported


def evaluate(
    model: Annotated[str, typer.Option(help="Hub name or folder; default: the bundled trained model.")] = "factworld",
    patch: Annotated[
        list[str] | None, typer.Option(help="A patch to compare with the model as it is; several: applied in order.")
    ] = None,
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
    out: Annotated[str, typer.Option(help="Folder for results.json and table.md; default: only shown.")] = "",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; default: the patch's, else that of the hparams.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: that of the hparams.")] = "",
) -> None:
    """Score records and general ability before and after a patch, in one table.

    Example: easyedit-moe evaluate --model factworld --data factworld --patch out/patch.safetensors --out results
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from easyedit_moe.comparison.report import check_folder
    from easyedit_moe.workflow.evaluate import evaluate as run
    from easyedit_moe.workflow.evaluation_report import COLUMNS, cells, write_evaluation

    console = Console()
    with errors_reported():
        if out:
            check_folder(out)
        result = run(model, patch or [], data or None, split_names(tasks or []), tasks_dir, limit, dtype, device)
        paths = write_evaluation(result, out) if out else []
    table = Table(box=box.SIMPLE_HEAD, title=result.provenance.get("protocols", {}).get("records"))
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 2 else "right")
    for measure in result.measures:
        table.add_row(*cells(measure))
    console.print(table, highlight=False)
    if paths:
        console.print("Written: " + ", ".join(str(path) for path in paths), highlight=False)
