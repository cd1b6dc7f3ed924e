"""``easyedit-moe compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands.reporting import errors_reported

if TYPE_CHECKING:
    from easyedit_moe.comparison.compare import Row

TABLE_WIDTH = 176  # a narrower terminal wraps whole lines, which reads better than columns cut to three letters


def compare(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="More methods, so that --methods A B C works.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub name or folder; default: the bundled trained model.")] = "factworld",
    data: Annotated[
        str, typer.Option(help="JSON file of records; factworld and factworld-easyedit ship.")
    ] = "factworld",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods, ours and EasyEdit's, separated by spaces or commas; all: every one of ours. Default: five."
        ),
    ] = None,
    edits: Annotated[int, typer.Option(help="Number of records to edit.")] = 100,
    skip: Annotated[int, typer.Option(help="Number of records to leave out at the start.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Edits per batch; batches follow each other.")] = 50,
    hparams: Annotated[
        str | None, typer.Option(help="A YAML file, or a folder of <METHOD>/<model>.yaml; default: those that ship.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for results.json, table.md and comparison.png.")] = "results",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the hparams.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: that of the hparams.")] = "",
    stats_dir: Annotated[str, typer.Option(help="Folder of cached statistics; default: that of the hparams.")] = "",
    easyedit_metrics: Annotated[
        bool | None, typer.Option(help="Score by EasyEdit's protocol, too; default: if a method is EasyEdit's.")
    ] = None,
) -> None:
    """Edit the same records by several methods and print a side-by-side table, scored after all edits."""
    from rich.console import Console

    from easyedit_moe import host
    from easyedit_moe.comparison.compare import compare as run
    from easyedit_moe.comparison.report import check_folder, tables, write_results
    from easyedit_moe.comparison.settings import ALL_METHODS, DEFAULT_METHODS, loading_settings, resolve_hparams
    from easyedit_moe.comparison.task import load_task
    from easyedit_moe.host.baseline_hparams import HOST_METHODS

    console = Console()
    wide = Console(width=max(console.width, TABLE_WIDTH))
    with errors_reported():
        names = split_names([*(methods or []), *(more or [])]) or list(DEFAULT_METHODS)
        if names == ["all"]:
            names = list(ALL_METHODS)
        overrides = {"device": device, "dtype": dtype, "stats_dir": stats_dir}
        overrides = {name: value for name, value in overrides.items() if value}
        settings = [resolve_hparams(name, model, hparams, {**overrides, "model_name": model}) for name in names]
        folder = check_folder(out)
        if easyedit_metrics is None:
            easyedit_metrics = any(name in HOST_METHODS for name in names)
        if easyedit_metrics:
            host.load()
        first = loading_settings(settings, model)
        task = load_task(
            model,
            data,
            edits,
            skip,
            batch_size,
            dtype or first.dtype,
            device or first.device,
            first.model_parallel,
            first.trust_remote_code,
        )
        result = run(
            task,
            settings,
            on_row=lambda row: console.print(f"{row.method}: {brief(row)}"),
            easyedit_metrics=easyedit_metrics,
        )
        paths = write_results(result, folder)
    for table in tables(result):
        wide.print(table)
    wide.print("Written: " + ", ".join(str(path) for path in paths), highlight=False)


def split_names(names: list[str]) -> list[str]:
    """Names that are separated by spaces (one each) or by commas."""
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def brief(row: Row) -> str:
    """A row's scores in one line, shown when the method is done."""
    scores = row.scores
    return (
        f"efficacy {scores.efficacy.mean:.1f}, generalisation {scores.generalisation.mean:.1f}, "
        f"specificity {scores.specificity.mean:.1f}"
    )
